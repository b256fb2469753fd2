"""The plan of a weight sync: which parameters travel together, in which order, from which stage.

Computed once and identical on every rank. It holds names and sizes, never tensors, so it cannot go
stale when storage moves.
"""

from dataclasses import dataclass

import torch

from grpo_mcore.models.build import weight_rules, whole_name
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: its name in its stage, its name over all stages, a shard's shape."""

    local_name: str
    name: str
    shard_shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shard_shape).numel()


@dataclass(frozen=True)
class Bucket:
    """Entries of one pipeline stage that are broadcast and gathered as one tensor."""

    stage: int
    entries: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        return sum(entry.numel for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """The buckets in order, and the rule of every parameter by its name over all stages."""

    buckets: tuple[Bucket, ...]
    rules: dict[str, Rule]


def make_plan(
    module: torch.nn.Module, shape: ModelShape, role: Role, bucket_bytes: int, element_bytes: int
) -> Plan:
    """Plans the sync of `module`. Collective over the role.

    Args:
        bucket_bytes: the most whole (gathered) bytes in a bucket, unless one parameter exceeds it.
        element_bytes: bytes of one element as it travels.
    """
    rules = weight_rules(shape)
    mine = [
        Entry(name, whole_name(name, shape, role), tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    ]
    by_stage = dict(role.all_gather((role.pipeline_rank, mine)))
    limit = bucket_bytes // (element_bytes * role.layout.tensor)
    buckets: list[Bucket] = []
    for stage in range(role.layout.pipeline):
        held: list[Entry] = []
        for entry in by_stage[stage]:
            if shape.tied and entry.name == "output_layer.weight":
                continue  # a copy of the embedding, which the first stage sends
            if held and sum(e.numel for e in held) + entry.numel > limit:
                buckets.append(Bucket(stage, tuple(held)))
                held = []
            held.append(entry)
        if held:
            buckets.append(Bucket(stage, tuple(held)))
    planned = {e.name for b in buckets for e in b.entries}
    left_out = sorted(rules.keys() - planned - ({"output_layer.weight"} if shape.tied else set()))
    if left_out:
        raise ValueError(f"no pipeline stage holds {left_out[0]}")
    return Plan(tuple(buckets), {e.name: rules[e.name] for b in buckets for e in b.entries})
