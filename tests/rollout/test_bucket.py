"""A bucket arrives as it was packed, in another process too, and a flipped bit shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_mcore.rollout.bucket import (
    ALIGNMENT,
    checksum,
    open_buffer,
    pack,
    packed_bytes,
    shared_buffer,
    unpack,
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
SIZE = packed_bytes(sum(t.nbytes for t in TENSORS.values()), len(TENSORS))


def assert_arrived(tensors):
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert checksum(tensors[name]) == checksum(tensor), name


def test_unpack_undoes_pack_bit_for_bit():
    buffer = torch.empty(SIZE, dtype=torch.uint8)
    slots = pack(TENSORS, buffer)
    assert_arrived(unpack(buffer, slots))
    assert all(slot.offset % ALIGNMENT == 0 for slot in slots)


def test_unpacked_tensors_outlive_the_buffer():
    buffer = torch.empty(SIZE, dtype=torch.uint8)
    tensors = unpack(buffer, pack(TENSORS, buffer))
    buffer.zero_()
    assert_arrived(tensors)


def test_room_is_enough_for_any_number_of_tensors():
    for count in (1, 5, 40):
        tensors = {str(n): torch.full((n + 1,), float(n)) for n in range(count)}
        size = packed_bytes(sum(t.nbytes for t in tensors.values()), count)
        buffer = torch.empty(size, dtype=torch.uint8)
        unpacked = unpack(buffer, pack(tensors, buffer))
        assert all(torch.equal(unpacked[name], tensors[name]) for name in tensors)


def test_a_bucket_too_large_for_its_buffer_is_an_error():
    with pytest.raises(RuntimeError):
        pack({"big": torch.zeros(100)}, torch.empty(64, dtype=torch.uint8))


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


def test_another_process_reads_and_writes_the_shared_buffer():
    buffer, path = shared_buffer(SIZE)
    slots = pack(TENSORS, buffer)
    program = (
        "from grpo_mcore.rollout.bucket import Slot, checksum, open_buffer, unpack\n"
        f"buffer = open_buffer({path!r}, {SIZE})\n"
        f"print([checksum(t) for t in unpack(buffer, {slots!r}).values()])\n"
        "buffer[0] += 1\n"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([checksum(t) for t in TENSORS.values()])
    changed = unpack(buffer, slots)["matrix"]
    assert not torch.equal(changed, TENSORS["matrix"])
    assert torch.equal(changed.view(-1)[1:], TENSORS["matrix"].view(-1)[1:])


def test_shared_buffer_has_no_file_that_could_be_left_behind():
    buffer, path = shared_buffer(SIZE)
    assert os.readlink(path).startswith("/memfd:")
    assert not [name for name in os.listdir("/dev/shm") if "grpo_mcore" in name]
    buffer[5] = 7
    assert open_buffer(path, SIZE)[5] == 7
