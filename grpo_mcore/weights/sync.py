"""Moves the trainer's weights into the engines, bucket by bucket, and proves that they arrived."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.nn import ModuleList

from grpo_mcore import device
from grpo_mcore.errors import KnownError
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rollout.bucket import Receipt, checksum, pack, packed_bytes, shared_buffer
from grpo_mcore.rollout.engine import Engine, EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

TENSORS_A_PARAMETER = 3
"""The most Hugging Face tensors one Megatron parameter becomes (query, key and value)."""


class SyncError(KnownError, RuntimeError):
    """An engine's weights differ from the trainer's; the text names the first such tensor."""


class WeightSync:
    """The path from one sharded model to one pool of engines. Collective over the role."""

    def __init__(
        self,
        chunks: ModuleList,
        shape: ModelShape,
        role: Role,
        pool: RolloutPool,
        bucket_megabytes: int,
    ):
        self.chunks, self.shape, self.role, self.pool = chunks, shape, role, pool
        element = next(chunks.parameters()).element_size()
        self.plan = make_plan(chunks, shape, role, bucket_megabytes << 20, element)
        self.size = max(
            packed_bytes(
                self.plan.whole_numel(b) * element, TENSORS_A_PARAMETER * b.experts * len(b.entries)
            )
            for b in self.plan.buckets
        )
        self.buffer: Tensor | None = None
        self.path: str | None = None

    def push(self, version: int) -> dict[str, int]:
        """Gives the engines the weights of trainer `version`.

        Returns:
            How many tensors and bytes went.

        Raises:
            SyncError: on every rank, when any engine received other bytes than were sent.
            EngineError: on every rank, when an engine cannot be kept alive.
        """
        pool, sent = self.pool, {}
        while behind := pool.behind(version):
            for replica in behind:
                pool.versions[replica] = -1  # until proven
            pool.wake("weights", replicas=behind)
            talk = Talk(pool.engine if pool.replica in behind else None)
            sent = self._stream(talk)
            outcomes = self.role.all_gather((pool.replica, talk.difference, talk.failure))
            found = next((difference for _, difference, _ in outcomes if difference), None)
            if found:
                raise SyncError(f"weight sync to version {version}: {found}")
            failures = {replica: failure for replica, _, failure in outcomes if failure}
            for replica in behind:
                if replica not in failures:
                    pool.versions[replica] = version
            pool.restart(failures)
        return sent

    def _stream(self, talk: "Talk") -> dict[str, int]:
        sent: dict[str, str] = {}
        count = total = 0
        talk.call("begin_sync")
        for tensors in stream_tensors(self.chunks, self.shape, self.plan, self.role):
            count += len(tensors)
            total += sum(t.nbytes for t in tensors.values())
            source, slots = self._offer(tensors)
            if talk.engine:
                sent |= {name: checksum(tensor) for name, tensor in tensors.items()}
            talk.call("receive_bucket", source, self.size, slots)
            if device.is_cuda():
                # The buffers belong to ranks that do not lead; they wait until it was read.
                self.role.all_gather(None)
        receipts = talk.call("end_sync")
        if receipts is not None:
            talk.difference = first_difference(sent, receipts)
        return {"tensors": count, "bytes": total}

    def _offer(self, tensors: dict[str, Tensor]):
        """Packs the bucket where the engine's workers can read it."""
        if device.is_cuda():
            if self.buffer is None:
                self.buffer = torch.empty(self.size, dtype=torch.uint8, device="cuda")
            slots = pack(tensors, self.buffer)
            device.synchronize()
            if self.pool.remote:
                return ("tensor", self.buffer), slots
            _, handle = reduce_tensor(self.buffer)
            handles = self.role.all_gather(handle)
            first = self.role.rank
            return ("cuda", handles[first : first + self.pool.tensor_parallel]), slots
        if not self.pool.engine:
            return None, None
        if self.buffer is None:
            self.buffer, self.path = shared_buffer(self.size)
        return ("memory", self.path), pack(tensors, self.buffer)


class Talk:
    """What a leader says to its engine in a sync, and how that ended. One whose engine has failed,
    like those who have none, says nothing more and goes on taking part in the collectives."""

    def __init__(self, engine: Engine | None):
        self.engine = engine
        self.difference: str | None = None
        self.failure: str | None = None

    def call(self, method: str, *arguments):
        if self.engine is None:
            return None
        try:
            return self.engine.call(method, *arguments)
        except EngineError as error:  # carried to all ranks when the stream has ended
            self.engine, self.failure = None, str(error)
            return None


def first_difference(sent: dict[str, str], receipts: list[Receipt]) -> str | None:
    """Names the first tensor that some worker lacks or has otherwise, or the first parameter of a
    worker that nothing was loaded into; None when every worker holds all that was sent."""
    if not receipts:
        return "no worker received anything"
    for worker, receipt in enumerate(receipts):
        for name, expected in sent.items():
            if receipt.checksums.get(name) != expected:
                return (
                    f"tensor {name} is {receipt.checksums.get(name, 'missing')} on worker "
                    f"{worker}, {expected} in the trainer"
                )
        if receipt.not_loaded:
            return f"parameter {receipt.not_loaded[0]} of worker {worker} was given no weights"
    return None
