"""The plan of a weight sync: which parameters travel together, in which order, from which stage.

Computed once and identical on every rank. It holds names and sizes, never tensors, so it cannot go
stale when storage moves.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.models.build import weight_rules
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role


@dataclass(frozen=True)
class Entry:
    """Parameters that lie in the same place of their ranks: the same one on all ranks of a stage,
    or an expert on each of its expert parallel ranks.

    Attributes:
        names: the name over the whole model, by expert parallel rank.
        shard_shape: of one rank's shard.
    """

    names: tuple[str, ...]
    shard_shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shard_shape).numel()

    @property
    def row_numel(self) -> int:
        return self.numel // self.shard_shape[0]


@dataclass(frozen=True)
class Bucket:
    """Entries of one pipeline stage that travel together.

    Attributes:
        experts: how many expert parallel ranks hold different parameters of it; 1: none do.
    """

    stage: int
    experts: int
    entries: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        """Elements of one rank's shards."""
        return sum(entry.numel for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """The buckets in order, the rule of every parameter by name, and the layout they are for."""

    buckets: tuple[Bucket, ...]
    rules: dict[str, Rule]
    layout: Layout

    @property
    def tensor(self) -> int:
        return self.layout.tensor

    def whole_numel(self, bucket: Bucket) -> int:
        """Elements of `bucket` with every rank's shards."""
        return bucket.numel * self.tensor * bucket.experts

    def teams(self, bucket: Bucket) -> list[list[int]]:
        """The sets of ranks that each hold all of `bucket` and its pipeline: the data parallel
        replicas or, where experts are spread over some of those, these together."""
        experts = ["expert"] if bucket.experts > 1 else []
        return self.layout.ranks_along("tensor", "pipeline", *experts)

    def sizes(self, bucket: Bucket) -> dict[str, tuple[int, ...]]:
        """The size of every Hugging Face tensor of `bucket`, by name."""
        sizes = {}
        for entry in bucket.entries:
            shards = [torch.empty(entry.shard_shape, device="meta")] * self.tensor
            for name in entry.names:
                merged = self.rules[name].merge(shards)
                sizes |= {tensor: tuple(whole.shape) for tensor, whole in merged.items()}
        return sizes

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every Hugging Face tensor's shape and type, as tensors without storage."""
        return {
            name: torch.empty(size, dtype=dtype, device="meta")
            for bucket in self.buckets
            for name, size in self.sizes(bucket).items()
        }


def layer_of(name: str) -> str:
    """What an engine loads at once, of which parameter `name` is a part: one linear layer, or all
    experts of a layer."""
    return name.split(".experts.")[0] if ".experts." in name else name.rpartition(".")[0]


def make_plan(
    chunks: ModuleList,
    shape: ModelShape,
    role: Role,
    bucket_bytes: int,
    element_bytes: int,
    rules: dict[str, Rule] | None = None,
) -> Plan:
    """Plans the sync of `chunks`. Collective over the role.

    Args:
        bucket_bytes: the most whole (gathered) bytes in a bucket, unless one parameter exceeds it.
        element_bytes: bytes of one element as it travels.
        rules: of the parameters that go; None: of the model's, without adapters.
    """
    rules = rules or weight_rules(shape, fuses_norms(chunks))
    weights = named_weights(chunks, shape, role)
    mine = [(name, tuple(p.shape)) for name, p in weights.items() if name in rules]
    held = {}
    for stage, expert, weights in role.all_gather((role.pipeline_rank, role.expert_rank, mine)):
        held[stage, expert] = weights
    plan = Plan((), rules, role.layout)
    most = bucket_bytes // element_bytes
    buckets: list[Bucket] = []
    for stage in range(role.layout.pipeline):
        entries = [
            Entry(tuple(dict.fromkeys(name for name, _ in same)), same[0][1])
            for same in zip(*(held[stage, e] for e in range(role.layout.expert)), strict=True)
        ]
        if shape.tied and stage > 0:
            # A copy of the embedding, which the first stage sends.
            entries = [e for e in entries if e.names != ("output_layer.weight",)]
        entries.sort(key=lambda e: len(e.names))
        for experts, kind in groupby(entries, key=lambda e: len(e.names)):
            bucket = Bucket(stage, experts, ())
            for _, layer in groupby(kind, key=lambda e: layer_of(e.names[0])):
                # An engine holds back what it has of a layer until it has all.
                for part in _parts_that_fit(list(layer), plan, bucket, most):
                    fuller = replace(bucket, entries=bucket.entries + part)
                    if bucket.entries and plan.whole_numel(fuller) > most:
                        buckets.append(bucket)
                        fuller = replace(bucket, entries=part)
                    bucket = fuller
            buckets.append(bucket)
    planned = {name for b in buckets for e in b.entries for name in e.names}
    left_out = sorted(rules.keys() - planned - ({"output_layer.weight"} if shape.tied else set()))
    if left_out:
        raise ValueError(f"no pipeline stage holds {left_out[0]}")
    return replace(plan, buckets=tuple(buckets))


def _parts_that_fit(
    layer: list[Entry], plan: Plan, bucket: Bucket, most: int
) -> list[tuple[Entry, ...]]:
    """All of `layer`, where a bucket has room for it; else its entries one by one."""
    whole = replace(bucket, entries=tuple(layer))
    return [whole.entries] if plan.whole_numel(whole) <= most else [(entry,) for entry in layer]
