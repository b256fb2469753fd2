"""A bucket of tensors in one flat buffer, and the checksums that prove it arrived.

On a CPU the buffer is anonymous shared memory, which the system frees with its last user however
that one dies; on a GPU it is device memory whose CUDA IPC handle travels.
"""

import json
import os
import urllib.request
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import xxhash
from torch import Tensor

ALIGNMENT = 512
FETCH_SECONDS = 600
"""Longest silence of a trainer in the middle of a bucket that is fetched from it."""
BUFFERS = 2
"""One is filled while the other is read."""
_WORDS = 1 << 22
"""Words of a tensor that `word_sum` looks at together; it needs 24 bytes for each."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a bucket's buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Delivery:
    """What an engine is told once of all syncs to come.

    Attributes:
        source: ("memory", paths of the buffers), or ("cuda", their IPC handles by worker); for
            servers ("tensor", the buffers themselves), which reach their workers as ("http", URLs).
        size: bytes of a buffer.
        buckets: what lies where in each bucket.
        is_last: there will be one sync only, so the buffers are let go after it.
    """

    source: tuple[str, list]
    size: int
    buckets: list[list[Slot]]
    is_last: bool = False


@dataclass(frozen=True)
class Receipt:
    """What one worker got in a sync: checksums of tensors by their Hugging Face names, and which of
    the worker's own parameters nothing was loaded into."""

    checksums: dict[str, int]
    not_loaded: list[str]


def to_json(value: Any) -> str:
    """`value`, in which slots, deliveries and receipts may lie, as text (tuples become lists)."""
    return json.dumps(value, default=lambda part: {type(part).__name__: vars(part)})


def from_json(text: str) -> Any:
    """What `to_json` was given."""
    kinds = {kind.__name__: kind for kind in (Slot, Delivery, Receipt)}

    def rebuild(part: dict) -> Any:
        name = next(iter(part), None)
        return kinds[name](**part[name]) if name in kinds else part

    return json.loads(text, object_hook=rebuild)


def arrange(sizes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Slot], int]:
    """Slots side by side for tensors of these sizes, and the bytes they take."""
    slots, offset = [], 0
    for name, size in sizes.items():
        slots.append(Slot(name, str(dtype).removeprefix("torch."), size, offset))
        offset += -(-torch.Size(size).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return slots, offset


def view(buffer: Tensor, slots: list[Slot]) -> dict[str, Tensor]:
    """The tensors that lie in the uint8 `buffer`."""
    return {slot.name: _view(buffer, slot) for slot in slots}


def checksum(tensor: Tensor) -> str:
    """XXH3 of the tensor's bytes."""
    return f"{_xxh3(tensor):016x}"


def checksums(tensors: Sequence[Tensor]) -> Tensor:
    """A 64-bit number for the bytes of each tensor: [tensors], int64, where they are.

    On a CPU it is XXH3. A GPU's are summed up there (`word_sum`), because to bring a model to the
    host would take longer than its sync. Both ends of a sync are of one kind.
    """
    if tensors and tensors[0].is_cuda:
        return torch.stack([word_sum(tensor) for tensor in tensors])
    numbers = numpy.array([_xxh3(tensor) for tensor in tensors], numpy.uint64)
    return torch.from_numpy(numbers.view(numpy.int64))


def word_sum(tensor: Tensor) -> Tensor:
    """The tensor's bytes as 32-bit words, each times an odd number that depends on its position,
    and the number of bytes, summed modulo 2^64: a scalar, int64, where the tensor is.

    No change of one word leaves the sum as it was, for an odd factor has an inverse; an exchange of
    two does once in 2^32 times or less.
    """
    bytes_ = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(bytes_) // 4 * 4
    rest = bytes_.new_zeros(4)
    rest[: len(bytes_) - whole] = bytes_[whole:]
    total = _weighted(rest.view(torch.int32), whole // 4) + len(bytes_)
    start = 0
    for words in bytes_[:whole].view(torch.int32).split(_WORDS):
        total = total + _weighted(words, start)
        start += len(words)
    return total


def shared_buffer(size: int) -> tuple[Tensor, str]:
    """A uint8 buffer of `size` bytes that another process of this user opens by the path given, as
    long as the buffer lives here."""
    descriptor = os.memfd_create("grpo_mcore_bucket")
    os.ftruncate(descriptor, size)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    buffer = open_buffer(path, size)
    weakref.finalize(buffer, os.close, descriptor)
    return buffer, path


def host_id() -> str:
    """What processes that can open each other's shared buffers have alike: the machine's boot and
    the namespace of process ids. A host's name may be that of several, as of copied containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def open_buffer(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def fetch_buffer(url: str, buffer: Tensor) -> None:
    """Fills the uint8 `buffer`, on the CPU, with what the trainer offers at `url`.

    Raises:
        OSError: when the trainer cannot be reached, or sends less.
    """
    room, read = memoryview(buffer.numpy()), 0
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=FETCH_SECONDS) as answer:
        while count := answer.readinto(room[read:]):
            read += count
    if read != len(buffer):
        raise OSError(f"{url} ended after {read} of {len(buffer)} bytes")


def _view(buffer: Tensor, slot: Slot) -> Tensor:
    part = buffer[slot.offset : slot.offset + slot.nbytes]
    return part.view(getattr(torch, slot.dtype)).view(slot.shape)


def _xxh3(tensor: Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy())


def _weighted(words: Tensor, start: int) -> Tensor:
    """Sum of `words`, the first of which stands at position `start`, times their factors."""
    factors = torch.arange(start, start + len(words), device=words.device).add_(1)
    # An odd constant spreads positions over 64 bits, and the shift brings high bits down.
    factors.mul_(-7046029254386353131)
    factors.bitwise_xor_(factors >> 32).bitwise_or_(1)
    return (factors * words).sum()
