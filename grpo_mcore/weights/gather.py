"""Writes a sharded model into whole Hugging Face tensors, bucket by bucket."""

from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import ModuleList, Parameter

from grpo_mcore import device
from grpo_mcore.models.lora import merged_weights
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.plan import Bucket, Entry, Plan


def stream_tensors(
    chunks: ModuleList,
    shape: ModelShape,
    plan: Plan,
    role: Role,
    pick: Callable[[Parameter], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yields each bucket's Hugging Face tensors, on every rank. Collective over the role.

    Args:
        pick: what to send of a parameter; its gradient (`main_grad`), for example. None: its
            values, with its adapters merged in.
    """
    gather = Gather(chunks, shape, plan, role, pick)
    everyone = [(rank,) for rank in range(role.layout.size)]
    for bucket in plan.buckets:
        tensors = {
            name: torch.empty(size, dtype=gather.dtype, device=gather.device)
            for name, size in plan.sizes(bucket).items()
        }
        gather.write(bucket, tensors, everyone)
        yield tensors


class Gather:
    """Writes the whole tensors of a bucket on those ranks that want them."""

    def __init__(
        self,
        chunks: ModuleList,
        shape: ModelShape,
        plan: Plan,
        role: Role,
        pick: Callable[[Parameter], Tensor] | None = None,
    ):
        """
        Args:
            pick: as of `stream_tensors`.
        """
        self.plan, self.role = plan, role
        self.parameters = named_weights(chunks, shape, role)
        self.pick = pick or merged_weights(chunks)
        with torch.no_grad():
            values = self.pick(next(p for n, p in self.parameters.items() if n in plan.rules))
        self.dtype, self.device = values.dtype, values.device
        largest = max(plan.whole_numel(b) for b in plan.buckets) * self.dtype.itemsize
        self.piece = device.exchange_bytes(largest) // self.dtype.itemsize
        """Elements that ranks exchange at once. Beside them the gather holds merged shards only."""

    @torch.no_grad()
    def write(
        self, bucket: Bucket, tensors: dict[str, Tensor], writers: Collection[tuple[int, ...]]
    ) -> None:
        """Fills `tensors`, all of `bucket`, on the ranks in `writers`. Called by all ranks of the
        role; those that no writer of their team needs return at once.

        Where a writer is of another pipeline stage than the bucket, that stage broadcasts its
        shards over the pipeline. Then tensor parallel ranks (with experts: and expert parallel
        ones) gather each other's, piece by piece; those that share their `tensors` write their own
        only, and return when all have.

        Args:
            writers: for each memory that is written, the ranks that write there, in order: one, or
                all of a tensor parallel group (with experts: and expert parallel).
        """
        role = self.role
        team = next(team for team in self.plan.teams(bucket) if role.rank in team)
        writing = set().union(*writers).intersection(team)
        relayed = any(role.layout.stage(r) != bucket.stage for r in writing)
        holds = role.pipeline_rank == bucket.stage
        if not writing or not (holds or relayed):
            return
        group = role.groups.tp if bucket.experts == 1 else role.groups.tp_ep
        members = tuple(dist.get_process_group_ranks(group))
        share = members in writers
        if share and not relayed:
            for entry in bucket.entries:
                self._place(entry, group.rank(), 0, self._shard(bucket, entry), tensors)
        else:
            for piece, flat in self._pieces(bucket, self.piece // group.size(), relayed):
                if writing.isdisjoint(members):
                    continue
                parts = {group.rank(): flat}
                if not share:
                    gathered = flat.new_empty(group.size() * len(flat))
                    dist.all_gather_into_tensor(gathered, flat, group=group)
                    parts = dict(enumerate(gathered.chunk(group.size())))
                if role.rank not in writing:
                    continue
                sizes = [(last - first) * entry.row_numel for entry, first, last in piece]
                for source, part in parts.items():
                    for (entry, first, _), rows in zip(piece, part.split(sizes), strict=True):
                        rows = rows.view(-1, *entry.shard_shape[1:])
                        self._place(entry, source, first, rows, tensors)
        if share and group.size() > 1:
            dist.barrier(group)

    def _pieces(
        self, bucket: Bucket, numel: int, relayed: bool
    ) -> Iterator[tuple[list[tuple[Entry, int, int]], Tensor]]:
        """This rank's shards in pieces of `numel` elements, and their values side by side. Where
        they are `relayed`, they come from the bucket's stage over the pipeline."""
        role, held = self.role, {}
        for piece in _cut(bucket.entries, numel):
            if role.pipeline_rank == bucket.stage:
                # A shard that goes on in the next piece is merged, or dequantised, only once.
                held = {e: held[e] if e in held else self._shard(bucket, e) for e, _, _ in piece}
                flat = torch.cat([held[e][first:last].reshape(-1) for e, first, last in piece])
            else:
                sizes = [(last - first) * entry.row_numel for entry, first, last in piece]
                flat = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            if relayed:
                pp = role.groups.pp
                dist.broadcast(flat, dist.get_global_rank(pp, bucket.stage), group=pp)
            yield piece, flat

    def _shard(self, bucket: Bucket, entry: Entry) -> Tensor:
        return self.pick(self.parameters[entry.names[self.role.expert_rank % bucket.experts]])

    def _place(
        self, entry: Entry, source: int, first: int, rows: Tensor, tensors: dict[str, Tensor]
    ) -> None:
        """Copies rows of a shard, from its row `first` on, to where they belong in `tensors`.

        Args:
            source: whose shard; tensor parallel fastest, then expert parallel.
        """
        expert, rank = divmod(source, self.plan.tensor)
        start = -first
        for place in self.plan.rules[entry.names[expert]].places(tensors, rank, self.plan.tensor):
            end = start + len(place)
            low, high = max(start, 0), min(end, len(rows))
            if low < high:
                place[low - start : high - start].copy_(rows[low:high])
            start = end


def _cut(entries: tuple[Entry, ...], numel: int) -> Iterator[list[tuple[Entry, int, int]]]:
    """Cuts entries into (entry, first row, end row), and yields as many at once as have `numel`
    elements together, but at least one row."""
    piece, room = [], numel
    for entry in entries:
        first = 0
        while first < entry.shard_shape[0]:
            rows = max(room, 0) // entry.row_numel
            if not rows and piece:
                yield piece
                piece, room = [], numel
                continue
            last = min(first + max(rows, 1), entry.shard_shape[0])
            piece.append((entry, first, last))
            room -= (last - first) * entry.row_numel
            first = last
    yield piece
