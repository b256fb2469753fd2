"""The process groups of one role, collected for Megatron and passed to it explicitly.

`parallel_state` stays uninitialised (but for its memory buffer), so that a hidden fallback in
Megatron asserts instead of using another role's groups.
"""

import torch.distributed as dist

from grpo_mcore.parallel.grid import Layout


class Role:
    """A named set of ranks with its own TP x PP x DP grid, seen from one of its ranks.

    Must be constructed by every rank of the default group at once, in the same order.

    Attributes:
        name: "teacher", "student" or "policy".
        rank: this process's rank in the role.
        groups: Megatron's collection; a group this rank is not in (`embd`, `pos_embd`) is None.
        everyone: the group of all ranks of the role.
    """

    def __init__(self, name: str, layout: Layout):
        # Here, as what only speaks of roles, such as the checks before a job, can do without it.
        from megatron.core import parallel_state
        from megatron.core.process_groups_config import ProcessGroupCollection

        if dist.get_world_size() != layout.size:
            raise ValueError(f"{name}: {dist.get_world_size()} ranks for layout {layout}")
        self.name, self.layout, self.rank = name, layout, dist.get_rank()
        groups = _GroupMaker(self.rank)
        along = layout.ranks_along
        pipelines = along("pipeline")
        tp, pp, dp = (groups.mine(along(d)) for d in ("tensor", "pipeline", "data"))
        ep, expt_dp = (groups.mine(along(d)) for d in ("expert", "replica"))
        alone = groups.mine(along())
        model = groups.mine(along("tensor", "pipeline"))
        self.everyone = groups.mine(along("tensor", "pipeline", "data"))
        # Megatron reads None as "size 1" and torch as "everybody", so only groups that a rank may
        # truly be outside of are ever None.
        self.groups = ProcessGroupCollection(
            tp=tp, pp=pp, dp=dp, cp=alone, ep=ep, mp=model,
            tp_cp=tp, expt_tp=tp, tp_ep=groups.mine(along("tensor", "expert")),
            tp_ep_pp=groups.mine(along("tensor", "expert", "pipeline")),
            dp_cp=dp, intra_dp_cp=dp, expt_dp=expt_dp, intra_expt_dp=expt_dp,
            intra_dist_opt=self.everyone, tp_dp_cp=groups.mine(along("tensor", "data")),
            embd=groups.mine([sorted({p[0], p[-1]}) for p in pipelines]),
            pos_embd=groups.mine([[p[0]] for p in pipelines]),
        )  # fmt: skip
        if parallel_state._GLOBAL_MEMORY_BUFFER is None:
            parallel_state._set_global_memory_buffer()

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def expert_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1

    def all_gather(self, value) -> list:
        """Every rank's Python `value`, in rank order, on every rank."""
        values = [None] * self.layout.size
        dist.all_gather_object(values, value, group=self.everyone)
        return values

    def broadcast(self, value):
        """Rank 0's Python `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.everyone)
        return box[0]

    def each(self, function) -> list:
        """What `function()` returns on every rank, in rank order, on every rank; if it raises on
        one, every rank raises."""
        outcomes = self.all_gather(_outcome(function))
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def once(self, function):
        """What `function()` returns on rank 0, on every rank; if it raises, every rank raises."""
        value, error = self.broadcast(_outcome(function) if self.rank == 0 else None)
        if error is not None:
            raise error
        return value


def _outcome(function) -> tuple:
    try:
        return function(), None
    except Exception as error:  # carried to the other ranks, which would wait for ever
        return None, error


class _GroupMaker:
    """Makes each distinct rank set's group once, whichever dimensions ask for it."""

    def __init__(self, rank: int):
        self.rank, self.made = rank, {}

    def mine(self, rank_sets: list[list[int]]) -> dist.ProcessGroup | None:
        """The group among `rank_sets` that holds this rank, or None."""
        mine = None
        for ranks in map(tuple, rank_sets):
            if ranks not in self.made:
                self.made[ranks] = dist.new_group(list(ranks))
            if self.rank in ranks:
                mine = self.made[ranks]
        return mine
