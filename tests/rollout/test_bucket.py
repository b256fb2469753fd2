"""A bucket arrives as it was packed, in another process too, and a flipped bit shows."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_mcore.rollout import bucket
from grpo_mcore.rollout.bucket import (
    ALIGNMENT,
    arrange,
    checksum,
    checksums,
    open_buffer,
    shared_buffer,
    view,
    word_sum,
)

ROOT = Path(__file__).resolve().parents[2]
TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "special": torch.tensor([float("nan"), float("-inf"), -0.0]),
    "numbers": torch.arange(9, dtype=torch.int64),
    "nothing": torch.zeros(0, 4),
    "one byte": torch.tensor([255], dtype=torch.uint8),
    "transposed": torch.arange(6.0).view(2, 3).t(),
}


def packed() -> tuple[torch.Tensor, list, str]:
    """A buffer with TENSORS, where they lie in it, and its path."""
    slots = []
    for name, tensor in TENSORS.items():
        (slot,), _ = arrange({name: tuple(tensor.shape)}, tensor.dtype)
        slots.append(replace(slot, offset=ALIGNMENT * len(slots)))
    buffer, path = shared_buffer(ALIGNMENT * len(slots))
    for name, place in view(buffer, slots).items():
        place.copy_(TENSORS[name])
    return buffer, slots, path


def assert_arrived(tensors):
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert checksum(tensors[name]) == checksum(tensor), name


def test_tensors_are_where_their_slots_say():
    buffer, slots, _ = packed()
    assert_arrived(view(buffer, slots))


@pytest.mark.parametrize("count", [1, 5, 40])
def test_slots_lie_side_by_side_and_aligned(count):
    sizes = {str(n): (n + 1, 3) for n in range(count)}
    slots, size = arrange(sizes, torch.bfloat16)
    assert [slot.nbytes for slot in slots] == [6 * (n + 1) for n in range(count)]
    assert all(slot.offset % ALIGNMENT == 0 for slot in slots)
    ends = [slot.offset + slot.nbytes for slot in slots]
    assert all(end <= later.offset for end, later in zip(ends, slots[1:], strict=False))
    assert ends[-1] <= size < ends[-1] + ALIGNMENT


def test_a_bucket_too_large_for_its_buffer_is_an_error():
    slots, _ = arrange({"big": (100,)}, torch.float32)
    with pytest.raises(RuntimeError):
        view(torch.empty(64, dtype=torch.uint8), slots)


def test_checksum_sees_one_flipped_bit():
    tensor = TENSORS["matrix"].clone()
    before = checksum(tensor)
    flat = tensor.view(-1).view(torch.uint8)
    for byte in (0, len(flat) - 1):
        flat[byte] ^= 1
        assert checksum(tensor) != before
        flat[byte] ^= 1
    assert checksum(tensor) == before
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("sums", [lambda t: checksums([t]).item(), lambda t: word_sum(t).item()])
def test_checksums_depend_on_bytes_alone(name, sums):
    tensor = TENSORS[name].contiguous()
    as_bytes = tensor.view(-1).view(torch.uint8)
    assert sums(tensor) == sums(as_bytes) == sums(TENSORS[name].clone())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 1001])
def test_word_sum_sees_any_flipped_bit_and_any_exchange(dtype, length):
    generator = torch.Generator().manual_seed(length)
    as_bytes = torch.randint(0, 256, [length * dtype.itemsize], generator=generator)
    tensor = as_bytes.to(torch.uint8).view(dtype)
    flat = tensor.view(torch.uint8)
    before = word_sum(tensor).item()
    seen = {before}
    for byte in {0, len(flat) // 2, len(flat) - 1}:
        for bit in range(8):
            flat[byte] ^= 1 << bit
            seen.add(word_sum(tensor).item())
            flat[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len({0, len(flat) // 2, len(flat) - 1})
    assert word_sum(tensor).item() == before
    for other in range(1, length):
        changed = tensor.clone()
        changed[0], changed[other] = tensor[other], tensor[0]
        same = torch.equal(changed.view(torch.uint8), flat)
        assert (word_sum(changed).item() == before) == same


def test_word_sum_sees_length_and_does_not_depend_on_blocks(monkeypatch):
    zeros = [word_sum(torch.zeros(n, dtype=torch.uint8)).item() for n in range(20)]
    assert len(set(zeros)) == 20
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = word_sum(tensor).item()
    monkeypatch.setattr(bucket, "_WORDS", 7)
    assert word_sum(tensor).item() == whole


def test_another_process_reads_and_writes_the_shared_buffer():
    buffer, slots, path = packed()
    program = (
        "from grpo_mcore.rollout.bucket import Slot, checksum, open_buffer, view\n"
        f"buffer = open_buffer({path!r}, {len(buffer)})\n"
        f"print([checksum(t) for t in view(buffer, {slots!r}).values()])\n"
        "buffer[0] += 1\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([checksum(t) for t in TENSORS.values()])
    changed = view(buffer, slots)["matrix"]
    assert not torch.equal(changed, TENSORS["matrix"])
    assert torch.equal(changed.view(-1)[1:], TENSORS["matrix"].view(-1)[1:])


def test_shared_buffer_has_no_file_that_could_be_left_behind():
    buffer, path = shared_buffer(4096)
    assert os.readlink(path).startswith("/memfd:")
    assert not [name for name in os.listdir("/dev/shm") if "grpo_mcore" in name]
    buffer[5] = 7
    assert open_buffer(path, 4096)[5] == 7
