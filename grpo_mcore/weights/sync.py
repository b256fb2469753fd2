"""Moves the trainer's weights into the engines, bucket by bucket, and proves that they arrived."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.nn import ModuleList

from grpo_mcore import device
from grpo_mcore.config import LoraConfig
from grpo_mcore.models.lora import SUFFIX, adapter_sizes
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import read_weight
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rollout.bucket import (
    BUFFERS,
    Delivery,
    Receipt,
    arrange,
    checksums,
    host_id,
    open_buffer,
    shared_buffer,
    view,
)
from grpo_mcore.rollout.engine import Engine, EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.weights.adapters import gather_adapters, plan_adapters, write_adapters
from grpo_mcore.weights.gather import Gather
from grpo_mcore.weights.plan import Bucket, Plan, layer_of, make_plan

_UNKNOWN = torch.iinfo(torch.int64).min
Site = str | int
"""A host or, on GPUs, a rank."""


class SyncError(EngineError):
    """An engine's weights differ from the trainer's; the text names the first such tensor."""


class WeightSync:
    """The path from one sharded model to one pool of engines. Collective over the role.

    There are two buffers at every *site*: a host on CPUs, whose ranks and engines share its memory;
    a rank on GPUs, where each worker of an engine reads its own device. While the engines load one
    bucket, the next is written into the other buffer. On GPUs every rank writes its own. On CPUs
    data parallel replicas of a host take turns, and what a replica does not write it does not
    gather; tensor parallel ranks of a host write a bucket together, each its own shards.

    An engine that holds an earlier version of a model with adapters is sent what these change, and
    no more.
    """

    def __init__(
        self,
        chunks: ModuleList,
        shape: ModelShape,
        role: Role,
        pool: RolloutPool,
        bucket_megabytes: int,
        lora: LoraConfig | None = None,
    ):
        """
        Args:
            lora: of the adapters of `chunks`, which engines shall be sent as they are; None: what
                they change is sent in their place.
        """
        self.chunks, self.shape, self.lora = chunks, shape, lora
        self.role, self.pool = role, pool
        room, element = bucket_megabytes << 20, next(chunks.parameters()).element_size()
        self.plan = make_plan(chunks, shape, role, room, element)
        self.gather = Gather(chunks, shape, self.plan, role, read_weight if lora else None)
        self.buckets = list(self.plan.buckets)
        self.whole = range(len(self.buckets))
        """Numbers of the buckets that hold the model; of those with what training changes:"""
        self.changing = self.whole
        self.adapters = plan_adapters(chunks, shape, role, lora) if lora else None
        named = role.all_gather([n for n in named_weights(chunks, shape, role) if SUFFIX in n])
        adapted = {name.partition(SUFFIX)[0] for names in named for name in names}
        if lora:
            self.changing = range(0)
        elif adapted:
            rules = {n: rule for n, rule in self.plan.rules.items() if layer_of(n) in adapted}
            self.buckets += make_plan(chunks, shape, role, room, element, rules).buckets
            self.changing = range(len(self.whole), len(self.buckets))
        arranged = [arrange(self.plan.sizes(b), self.gather.dtype) for b in self.buckets]
        self.slots = [slots for slots, _ in arranged]
        self.size = max(size for _, size in arranged)
        self.sites = role.all_gather(role.rank if device.is_cuda() else host_id())
        self.writers = [
            choose_writers(number, bucket, self.plan, self.sites)
            for number, bucket in enumerate(self.buckets)
        ]
        self.buffers: list[Tensor] = []
        self.delivery: Delivery | None = None
        self.informed: Engine | None = None
        """This rank's, once it knows the delivery; one that takes its place does not."""

    def push(self, version: int) -> dict[str, int]:
        """Gives the weights of trainer `version` to the engines that do not hold them. Those that
        fail are restarted and given them again.

        Returns:
            How many tensors and bytes went.

        Raises:
            SyncError: on every rank, when any engine received other bytes than were sent.
            EngineError: on every rank, when engines go on failing.
        """
        moved: dict[str, int] = {}
        while behind := self.pool.behind(version):
            self.pool.wake("weights", replicas=behind)  # one that fails is replaced and holds none
            # A first sync may meet engines that hold another model.
            anew = not self.delivery or any(self.pool.versions[e] < 0 for e in behind)
            numbers = self.whole if anew else self.changing
            difference, failure = self._stream(behind, numbers, version)
            outcomes = self.role.all_gather((difference, failure))
            outcomes = {engine: outcomes[self.pool.leader(engine)] for engine in behind}
            found = next((d for d, _ in outcomes.values() if d), None)
            if found:
                raise SyncError(f"weight sync to version {version}: {found}")
            failures = {engine: text for engine, (_, text) in outcomes.items() if text}
            for engine in outcomes.keys() - failures.keys():
                self.pool.versions[engine] = version
                if engine == self.pool.replica and not self.delivery.is_last:
                    self.informed = self.pool.engine
            if failures:
                self.pool.restart(failures)
            moved = self._size_of(numbers)
        return moved

    def _size_of(self, numbers: range) -> dict[str, int]:
        sizes = [slot.nbytes for number in numbers for slot in self.slots[number]]
        if self.lora:
            element = self.gather.dtype.itemsize
            sizes += [element * prod(s) for s in adapter_sizes(self.shape, self.lora).values()]
        return {"tensors": len(sizes), "bytes": sum(sizes)}

    def _stream(
        self, behind: list[int], numbers: range, version: int
    ) -> tuple[str | None, str | None]:
        """Sends the buckets `numbers`, and adapters that go by themselves, to the engines `behind`.

        Returns:
            How this rank's engine differs from the trainer, and how it failed; None: it did not.
        """
        pool = self.pool
        engine = pool.engine if pool.replica in behind else None
        for number in behind:
            pool.versions[number] = -1  # until proven
        if not self.delivery:
            self.buffers, self.delivery = self._open_buffers()
        link = _Link(engine)
        found = []
        if numbers:
            link.submit("begin_sync", None if engine is self.informed else self.delivery)
            sites = {self.sites[rank] for e in behind for rank in self._ranks_of_workers(e)}
            found.append(self._send_weights(link, sites, numbers))
        if self.lora:
            found.append(self._send_adapters(link, version))
        return next((difference for difference in found if difference), None), link.failure

    def _send_weights(self, link: "_Link", sites: set, numbers: range) -> str | None:
        role = self.role
        sums = []
        for turn, number in enumerate(numbers):
            place = turn % BUFFERS
            bucket, slots = self.buckets[number], self.slots[number]
            writers = [self.writers[number][site] for site in sites]
            together = next((ranks for ranks in writers if role.rank in ranks), ())
            tensors = view(self.buffers[place], slots) if together else {}
            self.gather.write(bucket, tensors, writers)
            found = torch.full([len(slots)], _UNKNOWN, device=self.gather.device)
            if together:
                mine = slice(together.index(role.rank), None, len(together))
                found[mine] = checksums(list(tensors.values())[mine])
            sums.append(found)
            device.synchronize()
            link.settle()
            # This bucket is written everywhere, and the last one was read.
            dist.barrier(role.everyone)
            link.submit("receive_bucket", number, place)
        sent = torch.cat(sums)
        dist.all_reduce(sent, dist.ReduceOp.MAX, group=role.everyone)
        link.settle()
        link.submit("end_sync")
        receipts = link.settle()
        if not link.works:
            return None
        names = [slot.name for number in numbers for slot in self.slots[number]]
        expected = dict(zip(names, sent.tolist(), strict=True))
        difference = first_difference(expected, receipts, shared=not device.is_cuda())
        if numbers == self.whole:
            difference = difference or first_without_weights(receipts)
        return difference

    def _send_adapters(self, link: "_Link", version: int) -> str | None:
        tensors = gather_adapters(self.chunks, self.shape, self.role, self.adapters)
        if not link.works:
            return None
        directory = self.pool.log_dir / f"{self.role.name}-{self.pool.replica}.adapters"
        shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
        try:
            directory.mkdir(parents=True)
            write_adapters(tensors, self.lora, directory, base="")
        except (OSError, SafetensorError) as error:  # the other ranks must not wait for this one
            link.failure = f"adapters cannot be written: {error}"
        link.submit("load_adapters", str(directory), version)
        receipts = link.settle()
        shutil.rmtree(directory, ignore_errors=True)
        if not link.works:
            return None
        sums = checksums(list(tensors.values())).tolist()
        return first_difference(dict(zip(tensors, sums, strict=True)), receipts, shared=False)

    def _ranks_of_workers(self, engine: int) -> range:
        """The ranks at whose sites the engine's workers read."""
        leader = self.pool.leader(engine)
        return range(leader, leader + (self.pool.spec.tensor_parallel if device.is_cuda() else 1))

    def _open_buffers(self) -> tuple[list[Tensor], Delivery]:
        """This site's buffers, and what this rank's engine is told of them."""
        if device.is_cuda():
            buffers = [
                torch.empty(self.size, dtype=torch.uint8, device="cuda") for _ in range(BUFFERS)
            ]
            if self.pool.remote:
                return buffers, self._delivery("tensor", buffers)
            handles = self.role.all_gather([reduce_tensor(buffer)[1] for buffer in buffers])
            ranks = self._ranks_of_workers(self.pool.replica)
            return buffers, self._delivery("cuda", handles[ranks.start : ranks.stop])
        owner = self.sites.index(self.sites[self.role.rank])
        owned = [shared_buffer(self.size) for _ in range(BUFFERS if owner == self.role.rank else 0)]
        paths = self.role.all_gather([path for _, path in owned])[owner]
        buffers = [buffer for buffer, _ in owned] or [open_buffer(p, self.size) for p in paths]
        return buffers, self._delivery("memory", paths)

    def _delivery(self, kind: str, where: list) -> Delivery:
        return Delivery((kind, where), self.size, self.slots, is_last=self.pool.spec.is_frozen)


def choose_writers(
    number: int, bucket: Bucket, plan: Plan, sites: Sequence[Site]
) -> dict[Site, tuple[int, ...]]:
    """By site the ranks that write bucket `number` there: of the next of the replicas that have
    ranks there; where it can be, of the bucket's pipeline stage. They are all of a tensor parallel
    group (of experts: expert parallel too), each of which writes its shards, or where that has
    ranks elsewhere one rank, which gathers them.

    Args:
        sites: of each rank.
    """
    near: dict[Site, list[list[int]]] = defaultdict(list)
    for team in plan.teams(bucket):
        for site in dict.fromkeys(sites[rank] for rank in team):
            near[site].append(team)
    stage, writers = plan.layout.stage, {}
    for site, teams in near.items():
        team = teams[number % len(teams)]
        here = [rank for rank in team if sites[rank] == site]
        first = min([rank for rank in here if stage(rank) == bucket.stage] or here)
        group = tuple(rank for rank in team if stage(rank) == stage(first))
        writers[site] = group if set(group) <= set(here) else (first,)
    return writers


class _Link:
    """One sync's calls to an engine, one at a time. Once the engine failed there are no more."""

    def __init__(self, engine: Engine | None):
        self.engine, self.under_way = engine, None
        self.failure: str | None = None

    @property
    def works(self) -> bool:
        return self.engine is not None and self.failure is None

    def submit(self, method: str, *arguments) -> None:
        if self.works:
            self._attempt(lambda: self.engine.submit(method, *arguments))
            self.under_way = method

    def settle(self):
        """The answer to the call under way."""
        if self.works:
            return self._attempt(lambda: self.engine.result(self.under_way))
        return None

    def _attempt(self, call: Callable):
        try:
            return call()
        except EngineError as error:  # the other ranks must not wait for this one
            self.failure = str(error)


def first_difference(sent: dict[str, int], receipts: list[Receipt], shared: bool) -> str | None:
    """Names the first tensor that some worker lacks or has otherwise; None when all hold all that
    was sent.

    Args:
        shared: whether the workers read the same bytes, so that it is enough that one has looked.
    """
    if not receipts:
        return "no worker received anything"
    looked = set().union(*(receipt.checksums for receipt in receipts))
    for name, expected in sent.items():
        for worker, receipt in enumerate(receipts):
            found = receipt.checksums.get(name)
            left_to_another = shared and found is None and name in looked
            if found != expected and not left_to_another:
                is_ = "missing" if found is None else _hexadecimal(found)
                return (
                    f"tensor {name} is {is_} on worker {worker}, {_hexadecimal(expected)} in the "
                    "trainer"
                )
    return None


def first_without_weights(receipts: list[Receipt]) -> str | None:
    """Names the first parameter of a worker that nothing was loaded into."""
    for worker, receipt in enumerate(receipts):
        if receipt.not_loaded:
            return f"parameter {receipt.not_loaded[0]} of worker {worker} was given no weights"
    return None


def _hexadecimal(checksum: int) -> str:
    return f"{checksum % 2**64:016x}"
