"""The plan of a weight sync: which parameters travel together, in which order, from which stage.

Computed once and identical on every rank. It holds names and sizes, never tensors, so it cannot go
stale when storage moves.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.models.build import weight_rules
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms
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


@dataclass(frozen=True)
class Bucket:
    """Entries of one pipeline stage that are broadcast and gathered as one tensor.

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
    """The buckets in order, the rule of every parameter by name, and the tensor parallel size."""

    buckets: tuple[Bucket, ...]
    rules: dict[str, Rule]
    tensor: int

    def whole_numel(self, bucket: Bucket) -> int:
        """Elements of `bucket` with every rank's shards."""
        return bucket.numel * self.tensor * bucket.experts

    def merge(self, entry: Entry, shards: list[Tensor]) -> dict[str, Tensor]:
        """Hugging Face tensors by name.

        Args:
            shards: by rank, tensor parallel fastest, then expert parallel.
        """
        tensors = {}
        for i, name in enumerate(entry.names):
            tensors |= self.rules[name].merge(shards[i * self.tensor : (i + 1) * self.tensor])
        return tensors

    def expected(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every Hugging Face tensor's shape and type, as tensors without storage."""
        tensors = {}
        for entry in (e for b in self.buckets for e in b.entries):
            shard = torch.empty(entry.shard_shape, dtype=dtype, device="meta")
            tensors |= self.merge(entry, [shard] * (self.tensor * len(entry.names)))
        return tensors


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
    plan = Plan((), rules, role.layout.tensor)
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
            for entry in kind:
                fuller = Bucket(stage, experts, (*bucket.entries, entry))
                if bucket.entries and plan.whole_numel(fuller) * element_bytes > bucket_bytes:
                    buckets.append(bucket)
                    fuller = Bucket(stage, experts, (entry,))
                bucket = fuller
            buckets.append(bucket)
    planned = {name for b in buckets for e in b.entries for name in e.names}
    left_out = sorted(rules.keys() - planned - ({"output_layer.weight"} if shape.tied else set()))
    if left_out:
        raise ValueError(f"no pipeline stage holds {left_out[0]}")
    return Plan(tuple(buckets), rules, role.layout.tensor)
