"""Records what the modules of a Megatron model compute, for a comparison with an engine's
(`rollout.probe`)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, ModuleList

from grpo_mcore.models.build import weight_rules
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.pipeline import run_pipeline

HEAD = "lm_head"


@dataclass(frozen=True)
class _Place:
    """A module by its Hugging Face name.

    Attributes:
        layer: to put the places of all stages in order; -1 before the layers.
        rule: of the weight whose output features tensor parallel ranks share as they share its
            rows.
        is_sharded: they share the features in order.
    """

    layer: int
    name: str
    rule: Rule | None = None
    is_sharded: bool = False


@torch.no_grad()
def probe_model(
    chunks: ModuleList, shape: ModelShape, role: Role, tokens: Sequence[int], multiple: int
) -> dict[str, Tensor]:
    """What each module of the model computes of a text. Collective over the role.

    Args:
        chunks: this rank's part of the model.
        multiple: what the length of a batch must divide by (`Split.length_multiple`).

    Returns:
        float32 [tokens, features] by the module's Hugging Face name, in the order in which they
        compute, on every rank. Transformer Engine fuses some norms, which are not there then; of a
        mixture of experts there is the whole.
    """
    batch = pad_batch([tokens], [[]], multiple)
    length = batch["tokens"].shape[1]
    kept: dict[_Place, Tensor] = {}

    def keep(place: _Place, output: Tensor) -> None:  # [tokens, 1 sequence, ...]
        # A copy: what follows adds residuals in place.
        if place not in kept:
            kept[place] = output.flatten(2).squeeze(1).to("cpu", torch.float32, copy=True)

    def on_output(_, logits: Tensor) -> tuple[Tensor, None]:
        keep(_Place(shape.layers, HEAD, is_sharded=True), logits.transpose(0, 1))
        return logits.sum() * 0, None

    chunks.eval()
    # A virtual pipeline wants as many micro-batches as it has stages.
    parts = [batch] * (role.layout.pipeline if len(chunks) > 1 else 1)
    with ExitStack() as hooks:
        for place, module in _places(chunks, shape):
            hooks.enter_context(module.register_forward_hook(_on_output(keep, place)))
        run_pipeline(chunks, role, parts, on_output, forward_only=True)
    # Data parallel ranks have all computed the same.
    mine = kept if role.data_rank == 0 else {}
    shards: dict[_Place, dict[int, Tensor]] = {}
    for rank, held in role.all_gather((role.tensor_rank, mine)):
        for place, output in held.items():
            shards.setdefault(place, {})[rank] = output
    found = {}
    for place in sorted(shards, key=lambda place: place.layer):
        outputs = [shards[place][rank] for rank in range(role.layout.tensor)]
        found |= _join(place, outputs, length)
    found[HEAD] = found[HEAD][:, : shape.vocab]
    return {name: output[: len(tokens)] for name, output in found.items()}


def _places(chunks: ModuleList, shape: ModelShape) -> Iterator[tuple[_Place, Module]]:
    rules = weight_rules(shape, fuses_norms(chunks))
    for chunk in chunks:
        if chunk.pre_process:
            yield _Place(-1, "model.embed_tokens"), chunk.embedding
        for layer in chunk.decoder.layers:
            n = layer.layer_number - 1
            ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
            attention, mlp = layer.self_attention, layer.mlp
            if hasattr(layer.input_layernorm, "weight"):
                yield _Place(n, f"{theirs}input_layernorm"), layer.input_layernorm
            rule = rules[f"{ours}self_attention.linear_qkv.weight"]
            yield _Place(n, f"{theirs}self_attn.qkv", rule), attention.linear_qkv
            if shape.qk_norm:
                for part, norm in (("q", attention.q_layernorm), ("k", attention.k_layernorm)):
                    yield _Place(n, f"{theirs}self_attn.{part}_norm", is_sharded=True), norm
            core = attention.core_attention
            yield _Place(n, f"{theirs}self_attn.attn", is_sharded=True), core
            yield _Place(n, f"{theirs}self_attn.o_proj"), attention.linear_proj
            if hasattr(layer.pre_mlp_layernorm, "weight"):
                yield _Place(n, f"{theirs}post_attention_layernorm"), layer.pre_mlp_layernorm
            if shape.has_experts(n):
                [router] = rules[f"{ours}mlp.router.weight"].names
                yield _Place(n, router.removesuffix(".gate.weight")), mlp
            else:
                rule = rules[f"{ours}mlp.linear_fc1.weight"]
                yield _Place(n, f"{theirs}mlp.gate_up", rule), mlp.linear_fc1
                yield _Place(n, f"{theirs}mlp.down_proj"), mlp.linear_fc2
        if chunk.post_process:
            yield _Place(shape.layers, "model.norm"), chunk.decoder.final_layernorm


def _join(place: _Place, outputs: list[Tensor], length: int) -> dict[str, Tensor]:
    """Whole outputs by name, from those of the tensor parallel ranks."""
    if place.rule:
        merged = place.rule.merge([output.T for output in outputs])
        return {name.removesuffix(".weight"): output.T for name, output in merged.items()}
    if place.is_sharded:
        return {place.name: torch.cat(outputs, dim=1)}
    if len(outputs[0]) < length:  # sequence parallelism: each has some of the tokens
        return {place.name: torch.cat(outputs)}
    return {place.name: outputs[0]}


def _on_output(keep, place: _Place):
    def hook(module, arguments, output) -> None:
        keep(place, output[0] if isinstance(output, tuple) else output)

    return hook
