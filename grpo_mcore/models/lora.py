"""LoRA: trainable low-rank matrices beside frozen ones (Hu et al., arXiv 2106.09685).

A matrix W [outputs, inputs] acts as W + scale B A, with A [r, inputs] and B [outputs, r]. Every
Hugging Face matrix has an A and a B of its own, as in PEFT, also where Megatron holds several
matrices in one layer. Beside a column parallel layer B is split as W is, and A is whole on every
rank; beside a row parallel one A is split and B is whole. What ranks exchange is r wide.

Adapters stand next to the layer they serve, "self_attention.linear_qkv_adapters" next to
"self_attention.linear_qkv", and a hook adds what they give to its output. So the layer, its names
and all that reads them are as without adapters.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter, ParameterDict
from torch.nn.functional import dropout, linear, rms_norm
from torch.nn.init import kaiming_uniform_

from grpo_mcore import device
from grpo_mcore.config import LoraConfig
from grpo_mcore.models.adapter_files import (
    adapter_sizes,
    is_adapted,
    module_of,
    open_adapter,
    pair_names,
)
from grpo_mcore.models.build import weight_rules
from grpo_mcore.models.rules import QKV, Columns, Reader, Replicated, Rows, Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms, read_weight
from grpo_mcore.parallel.groups import Role

SUFFIX = "_adapters"
MERGED_ROWS = 512
"""Rows of a matrix that adapters are merged into at once."""
_LAYERS = (
    ("self_attention", "linear_qkv"),
    ("self_attention", "linear_proj"),
    ("mlp", "linear_fc1"),
    ("mlp", "linear_fc2"),
)


def add_adapters(
    chunks: ModuleList, shape: ModelShape, role: Role, lora: LoraConfig, seed: int
) -> None:
    """Freezes `chunks` and gives them adapters: those at `lora.path`, or new ones, as PEFT begins
    them: A uniform (Kaiming, a = sqrt(5)) and B zero.

    What is drawn depends on `seed` and the names of the matrices alone, and not on the layout.

    Args:
        lora: as `read_lora_config` returns it.
    """
    chunks.requires_grad_(False)
    config, rules = chunks[0].config, weight_rules(shape, fuses_norms(chunks))
    values = (
        open_adapter(lora, shape) if lora.path else _NewAdapters(adapter_sizes(shape, lora), seed)
    )
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for block, name in _LAYERS:
                # Megatron counts layers from 1. Of experts there is no weight of this name.
                rule = rules.get(f"decoder.layers.{layer.layer_number - 1}.{block}.{name}.weight")
                if rule and _adapted(rule, lora):
                    parent = getattr(layer, block)
                    served = getattr(parent, name)
                    adapters = Adapters(served, rule, lora, values, role, config)
                    parent.add_module(name + SUFFIX, adapters)
                    _serve(served, adapters, shape.norm_eps)
        if config.recompute_granularity == "full" and chunk.pre_process:
            # Megatron recomputes a layer only for the gradient of its input, and a frozen
            # embedding's output has none.
            chunk.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())


@contextmanager
def adapters_disabled(chunks: ModuleList) -> Iterator[None]:
    """While it lasts `chunks` compute what they did before they had adapters."""
    adapters = [module for module in chunks.modules() if isinstance(module, Adapters)]
    for module in adapters:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapters:
            module.enabled = True


def merged_weights(chunks: ModuleList) -> Callable[[Parameter], Tensor]:
    """Gives a parameter's values in its own type, what its adapters do included."""
    adapters = {
        chunk.get_parameter(f"{path.removesuffix(SUFFIX)}.weight"): module
        for chunk in chunks
        for path, module in chunk.named_modules()
        if isinstance(module, Adapters)
    }

    def merged(parameter: Parameter) -> Tensor:
        weight = read_weight(parameter)
        return adapters[parameter].merge(weight) if parameter in adapters else weight

    return merged


def adapter_rules(shape: ModelShape, lora: LoraConfig, fused_norms: bool) -> dict[str, Rule]:
    """Rules that make PEFT's tensors of the adapters, by parameter name over all stages."""
    return {
        f"{weight.removesuffix('.weight')}{SUFFIX}.{module_of(name)}.{kind}": of_pair
        for weight, rule in weight_rules(shape, fused_norms).items()
        for name in _adapted(rule, lora)
        for kind, of_pair in zip(("lora_A", "lora_B"), _pair_rules(name, rule), strict=True)
    }


class Adapters(ModuleDict):
    """The adapters of one linear layer of Megatron's, by the names of the matrices they adapt.

    Attributes:
        enabled: whether they add to the layer's output.
    """

    def __init__(
        self,
        layer: Module,
        rule: Rule,
        lora: LoraConfig,
        values: Reader,
        role: Role,
        config: TransformerConfig,
    ):
        """
        Args:
            rule: of the layer's weight.
            values: what A and B are at first, by PEFT's names.
        """
        super().__init__()
        self.enabled = True
        self.group, self.sequence_parallel = role.groups.tp, config.sequence_parallel
        self.r, self.dropout = lora.r, lora.lora_dropout
        self.scale = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        self.splits_inputs = isinstance(rule, Columns)
        # The layer's outputs on this rank are blocks, in each of which every matrix has some rows.
        outputs = len(layer.weight)
        self.rows = dict(zip(map(module_of, rule.names), _rows(rule, outputs), strict=True))
        self.blocks = outputs // sum(self.rows.values())
        for name in _adapted(rule, lora):
            a, b = (
                Parameter(
                    of_pair.shard(values, role.tensor_rank, role.layout.tensor).to(
                        device.torch_device(), config.params_dtype
                    )
                )
                for of_pair in _pair_rules(name, rule)
            )
            split, whole, dim = (a, b, 1) if self.splits_inputs else (b, a, 0)
            set_tensor_model_parallel_attributes(split, is_parallel=True, dim=dim, stride=1)
            # Its gradient is then of this rank's part of the sequence, and Megatron sums them.
            whole.sequence_parallel = config.sequence_parallel
            self[module_of(name)] = ParameterDict({"lora_A": a, "lora_B": b})

    def forward(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """What the layer gave, with what its adapters add.

        Args:
            inputs: [tokens, sequences, width], this rank's, as the layer gets them.
            outputs: [tokens, sequences, width], this rank's, as the layer gives them.
        """
        inner = torch.cat([linear(self._drop(inputs), pair.lora_A) for pair in self.values()], -1)
        parts = (self._exchange(inner) * self.scale).split(self.r, dim=-1)
        pairs = zip(self.items(), parts, strict=True)
        return self._add(outputs, {name: linear(part, pair.lora_B) for (name, pair), part in pairs})

    @torch.no_grad()
    def merge(self, weight: Tensor) -> Tensor:
        """This rank's shard of the layer's weight [outputs, inputs], plus scale B A."""
        merged = weight.clone()
        blocks = merged.unflatten(0, (self.blocks, -1)).split(list(self.rows.values()), dim=1)
        for name, adapted in zip(self.rows, blocks, strict=True):
            if name not in self:
                continue
            a, b = self[name].lora_A.float(), self[name].lora_B.unflatten(0, (self.blocks, -1))
            for block, block_b in zip(adapted, b, strict=True):
                # Some rows at once: in 32 bits, whole matrices would take several times the shard.
                parts = zip(block.split(MERGED_ROWS), block_b.split(MERGED_ROWS), strict=True)
                for rows, rows_b in parts:
                    rows.copy_(rows.float() + self.scale * (rows_b.float() @ a))
        return merged

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        """The parameters as Megatron wants them described for a distributed checkpoint. A matrix's
        rows lie there in its own order: interleaved they are only in the layer's output."""
        kind, dim = ("lora_A", 1) if self.splits_inputs else ("lora_B", 0)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"{name}.{kind}": dim for name in self},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def _drop(self, inputs: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return inputs
        generators = get_cuda_rng_tracker()
        # Ranks that have the same inputs must drop the same of them.
        differ = self.splits_inputs or self.sequence_parallel
        with generators.fork() if differ else generators.fork(get_data_parallel_rng_tracker_name()):
            return dropout(inputs, self.dropout)

    def _exchange(self, inner: Tensor) -> Tensor:
        """What A gives on this rank, as B needs it."""
        if not self.splits_inputs:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(inner, group=self.group)
            return copy_to_tensor_model_parallel_region(inner, self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, self.group)
        return reduce_from_tensor_model_parallel_region(inner, self.group)

    def _add(self, outputs: Tensor, added: dict[str, Tensor]) -> Tensor:
        """`outputs` [..., the layer's outputs], plus those of each matrix where they belong."""
        parts = outputs.unflatten(-1, (self.blocks, -1)).split(list(self.rows.values()), dim=-1)
        sums = [
            part + added[name].unflatten(-1, (self.blocks, -1)) if name in added else part
            for name, part in zip(self.rows, parts, strict=True)
        ]
        return torch.cat(sums, dim=-1).flatten(-2)


@dataclass(frozen=True)
class _NewAdapters:
    """Reads adapters that begin: A is drawn and B is zero."""

    sizes: dict[str, tuple[int, int]]
    seed: int

    def shape(self, name: str) -> list[int]:
        return list(self.sizes[name])

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        values = torch.zeros(self.sizes[name])
        if ".lora_A." in name:
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
            kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        return values[start:stop] if dim == 0 else values[:, start:stop]


def _serve(layer: Module, adapters: Adapters, norm_eps: float) -> None:
    """Has `adapters` add to the output of `layer`, which gives (output, bias)."""
    # Transformer Engine's layers begin with the norm before them.
    norm = getattr(layer, "layer_norm_weight", None)

    def add(_: Module, arguments: tuple, result: tuple) -> tuple:
        if not adapters.enabled:
            return result
        inputs, (output, bias) = arguments[0], result
        if norm is not None:
            inputs = rms_norm(inputs, norm.shape, norm, norm_eps)
        return adapters(inputs, output), bias

    layer.register_forward_hook(add)


def _adapted(rule: Rule, lora: LoraConfig) -> list[str]:
    """The matrices among those of `rule` that have adapters."""
    return [name for name in rule.names if is_adapted(name, lora)]


def _rows(rule: Rule, outputs: int) -> list[int]:
    """Rows that each matrix has in a block of a layer's outputs, of which this rank has so many."""
    if isinstance(rule, QKV):
        return [heads * rule.head_dim for heads in (rule.queries_per_group, 1, 1)]
    return [outputs // len(rule.names)] * len(rule.names)


def _pair_rules(name: str, rule: Rule) -> tuple[Rule, Rule]:
    """The rules of A and B of matrix `name`, in a layer whose weight has `rule`."""
    a, b = pair_names(name)
    return (Columns(a), Replicated(b)) if isinstance(rule, Columns) else (Replicated(a), Rows(b))
