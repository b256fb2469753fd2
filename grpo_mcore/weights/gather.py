"""Streams a sharded model as whole Hugging Face tensors, bucket by bucket."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import ModuleList, Parameter

from grpo_mcore.models.lora import merged_weights
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.plan import Plan


@torch.no_grad()
def stream_tensors(
    chunks: ModuleList,
    shape: ModelShape,
    plan: Plan,
    role: Role,
    pick: Callable[[Parameter], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yields each bucket's Hugging Face tensors, on every rank. Collective over the role.

    The stage that holds a bucket broadcasts its shards over the pipeline, then tensor parallel
    ranks (with experts: and expert parallel ones) gather each other's: two collectives a bucket,
    and never more than a bucket in memory.

    Args:
        pick: what to send of a parameter; its gradient (`main_grad`), for example. None: its
            values, with its adapters merged in.
    """
    pick = pick or merged_weights(chunks)
    parameters = named_weights(chunks, shape, role)
    like = pick(next(p for name, p in parameters.items() if name in plan.rules))
    for bucket in plan.buckets:
        if role.pipeline_rank == bucket.stage:
            mine = [e.names[role.expert_rank % bucket.experts] for e in bucket.entries]
            flat = torch.cat([pick(parameters[name]).reshape(-1) for name in mine])
        else:
            flat = like.new_empty(bucket.numel)
        pp = role.groups.pp
        if pp.size() > 1:
            dist.broadcast(flat, dist.get_global_rank(pp, bucket.stage), group=pp)
        group = role.groups.tp if bucket.experts == 1 else role.groups.tp_ep
        shards = [flat]
        if group.size() > 1:
            gathered = flat.new_empty(group.size() * flat.numel())
            dist.all_gather_into_tensor(gathered, flat, group=group)
            shards = gathered.chunk(group.size())
        split = [s.split([e.numel for e in bucket.entries]) for s in shards]
        tensors = {}
        for i, entry in enumerate(bucket.entries):
            tensors |= plan.merge(entry, [pieces[i].view(entry.shard_shape) for pieces in split])
        yield tensors
