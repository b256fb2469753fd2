"""Streams a sharded model as whole Hugging Face tensors, bucket by bucket."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.plan import Plan


@torch.no_grad()
def stream_tensors(
    module: torch.nn.Module,
    plan: Plan,
    role: Role,
    pick: Callable[[torch.nn.Parameter], Tensor] = lambda parameter: parameter.data,
) -> Iterator[dict[str, Tensor]]:
    """Yields each bucket's Hugging Face tensors, on every rank. Collective over the role.

    The stage that holds a bucket broadcasts its shards over the pipeline, then tensor parallel
    ranks gather each other's: two collectives a bucket, and never more than a bucket in memory.

    Args:
        pick: what to send of a parameter; its gradient (`main_grad`), for example.
    """
    parameters = dict(module.named_parameters())
    like = pick(next(iter(parameters.values())))
    tp, pp = role.groups.tp, role.groups.pp
    for bucket in plan.buckets:
        if role.pipeline_rank == bucket.stage:
            flat = torch.cat([pick(parameters[e.local_name]).reshape(-1) for e in bucket.entries])
        else:
            flat = like.new_empty(bucket.numel)
        if pp.size() > 1:
            dist.broadcast(flat, dist.get_global_rank(pp, bucket.stage), group=pp)
        shards = [flat]
        if tp.size() > 1:
            gathered = flat.new_empty(tp.size() * flat.numel())
            dist.all_gather_into_tensor(gathered, flat, group=tp)
            shards = gathered.chunk(tp.size())
        split = [s.split([e.numel for e in bucket.entries]) for s in shards]
        tensors = {}
        for i, entry in enumerate(bucket.entries):
            parts = [pieces[i].view(entry.shard_shape) for pieces in split]
            tensors |= plan.rules[entry.name].merge(parts)
        yield tensors
