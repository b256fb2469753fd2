"""Records what the modules of an engine compute, for a comparison with the trainer's
(`training.probe`)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from grpo_mcore.rollout.receiver import WeightReceiver

WHOLE = (
    "embed_tokens",
    "input_layernorm",
    "o_proj",
    "post_attention_layernorm",
    "down_proj",
    "norm",
)
"""The last names of modules whose output every worker has whole."""
SHARDED = ("q_norm", "k_norm", "attn", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""And of those of whose features each worker has a part."""


class Probe(WeightReceiver):
    """A receiver of weights whose model's outputs can be looked at; vLLM runs it eagerly then."""

    def begin_probe(self) -> None:
        """From now on each module's outputs are kept."""
        self.probed: dict[str, list[Tensor]] = {}
        self.probe_hooks = []
        modules = dict(self.model_runner.model.named_modules())
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            keep = None
            is_mixture = last in ("mlp", "block_sparse_moe") and hasattr(module, "experts")
            if is_mixture or last in (*WHOLE, "q_norm", "attn"):
                keep = partial(self._keep, name)
            elif last == "k_norm":
                keep = partial(self._keep_heads, name, modules[f"{parent}.qkv_proj"])
            elif last == "qkv_proj":
                keep = partial(self._keep_qkv, parent, module)
            elif last == "gate_up_proj":
                keep = partial(self._keep_gate_up, parent)
            if keep:
                self.probe_hooks.append(module.register_forward_hook(_on_output(keep)))

    def end_probe(self) -> dict[str, np.ndarray]:
        """What was kept: float32 [tokens, features] by the module's Hugging Face name."""
        for hook in self.probe_hooks:
            hook.remove()
        found = {name: torch.cat(parts) for name, parts in self.probed.items()}
        # The engine itself computes logits only where it samples.
        logits = self.model_runner.model.compute_logits(found["model.norm"])
        if logits is not None:  # it is so on all workers but the first
            found["lm_head"] = logits
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}

    def _keep(self, name: str, output: Tensor) -> None:
        # A copy: what follows adds residuals in place.
        self.probed.setdefault(name, []).append(output.detach().flatten(1).clone())

    def _keep_heads(self, name: str, qkv: Module, output: Tensor) -> None:
        """Key-value heads, which several workers may share; the first of them has them all."""
        is_copy = qkv.tp_rank % qkv.num_kv_head_replicas > 0
        self._keep(name, output.flatten(1)[:, :0] if is_copy else output)

    def _keep_qkv(self, parent: str, qkv: Module, output: Tensor) -> None:
        sizes = [n * qkv.head_size for n in (qkv.num_heads, qkv.num_kv_heads, qkv.num_kv_heads)]
        query, key, value = output.split(sizes, dim=-1)
        self._keep(f"{parent}.q_proj", query)
        self._keep_heads(f"{parent}.k_proj", qkv, key)
        self._keep_heads(f"{parent}.v_proj", qkv, value)

    def _keep_gate_up(self, parent: str, output: Tensor) -> None:
        for name, part in zip(("gate_proj", "up_proj"), output.chunk(2, dim=-1), strict=True):
            self._keep(f"{parent}.{name}", part)


def join_workers(found: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The whole outputs from those of all workers of an engine, in the order of their ranks."""
    joined = {}
    for name, first in found[0].items():
        if name.rpartition(".")[2] in SHARDED:
            first = np.concatenate([worker[name] for worker in found], axis=1)
        joined[name] = torch.from_numpy(first)
    return joined


def _on_output(keep):
    def hook(module, arguments, output) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    return hook
