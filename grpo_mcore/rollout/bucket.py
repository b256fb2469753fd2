"""A bucket of tensors in one flat buffer, and the checksum that proves it arrived.

On a CPU the buffer is anonymous shared memory, which the system frees with its last user however
that one dies; on a GPU it is device memory whose CUDA IPC handle travels.
"""

import json
import os
import urllib.request
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

ALIGNMENT = 512
FETCH_SECONDS = 600
"""Longest silence of a trainer in the middle of a bucket that is fetched from it."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a bucket's buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Receipt:
    """What one worker got in a sync: each tensor's checksum by its Hugging Face name, and which of
    the worker's own parameters nothing was loaded into."""

    checksums: dict[str, str]
    not_loaded: list[str]


def to_json(value: Any) -> str:
    """`value`, in which slots and receipts may lie, as text (tuples become lists)."""
    return json.dumps(value, default=lambda part: {type(part).__name__: vars(part)})


def from_json(text: str) -> Any:
    """What `to_json` was given."""
    kinds = {kind.__name__: kind for kind in (Slot, Receipt)}

    def rebuild(part: dict) -> Any:
        name = next(iter(part), None)
        return kinds[name](**part[name]) if name in kinds else part

    return json.loads(text, object_hook=rebuild)


def pack(tensors: dict[str, Tensor], buffer: Tensor) -> list[Slot]:
    """Copies `tensors` into the uint8 `buffer`, side by side."""
    slots, offset = [], 0
    for name, tensor in tensors.items():
        slot = Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)
        _view(buffer, slot).copy_(tensor)
        slots.append(slot)
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return slots


def unpack(buffer: Tensor, slots: list[Slot]) -> dict[str, Tensor]:
    """Copies of the bucket's tensors: the engine may keep them past the next bucket's arrival."""
    return {slot.name: _view(buffer, slot).clone() for slot in slots}


def packed_bytes(tensor_bytes: int, tensors: int) -> int:
    """Room that `tensors` of `tensor_bytes` together need, alignment included."""
    return tensor_bytes + tensors * ALIGNMENT


def checksum(tensor: Tensor) -> str:
    """XXH3 of the tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy()) if flat.numel() else "empty"


def shared_buffer(size: int) -> tuple[Tensor, str]:
    """A uint8 buffer of `size` bytes that another process of this user opens by the path given, as
    long as the buffer lives here."""
    descriptor = os.memfd_create("grpo_mcore_bucket")
    os.ftruncate(descriptor, size)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    buffer = open_buffer(path, size)
    weakref.finalize(buffer, os.close, descriptor)
    return buffer, path


def open_buffer(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def fetch_buffer(url: str, size: int) -> Tensor:
    """The uint8 buffer of `size` bytes that the trainer offers at `url`.

    Raises:
        OSError: when the trainer cannot be reached, or sends less.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, timeout=FETCH_SECONDS) as answer:
        read = 0
        while count := answer.readinto(view[read:]):
            read += count
    if read != size:
        raise OSError(f"{url} ended after {read} of {size} bytes")
    return buffer


def _view(buffer: Tensor, slot: Slot) -> Tensor:
    dtype = getattr(torch, slot.dtype)
    count = torch.Size(slot.shape).numel()
    part = buffer[slot.offset : slot.offset + count * dtype.itemsize]
    return part.view(dtype).view(slot.shape)
