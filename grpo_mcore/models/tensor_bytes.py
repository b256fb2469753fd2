"""Tensors as plain bytes in files, read and written block by block: whatever a tensor's size, no
second copy of it is made, and no page of the file stays mapped."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from grpo_mcore.errors import FilesError

BLOCK_BYTES = 16 << 20


def read_into(
    out: Tensor,
    path: Path,
    offset: int,
    dtype: torch.dtype,
    row: Sequence[int],
    columns: slice | None = None,
) -> None:
    """Fills `out` with the rows that lie in the file from byte `offset` on, cast to its own type.

    Args:
        out: [rows, ...]; any strides.
        dtype: of the stored rows.
        row: the shape of a stored row.
        columns: which entries of each row are wanted; None: all.

    Raises:
        FilesError: when the file ends before the last row.
    """
    step = max(1, BLOCK_BYTES // max(1, prod(row) * dtype.itemsize))
    straight = columns is None and out.dtype == dtype and out.is_contiguous()
    buffer = out if straight else torch.empty((min(step, len(out)), *row), dtype=dtype)
    with path.open("rb") as file:
        file.seek(offset)
        for rows in out.split(step):
            block = rows if straight else buffer[: len(rows)]
            if file.readinto(_bytes(block)) != block.nbytes:
                raise FilesError(f"{path}: is truncated, a tensor goes on past its end")
            if not straight:
                rows.copy_(block if columns is None else block[:, columns])


def write_from(tensor: Tensor, file: BinaryIO, offset: int, dtype: torch.dtype) -> None:
    """Writes `tensor` [rows, ...], on whatever device and of whatever strides, as `dtype` from byte
    `offset` on."""
    step = max(1, BLOCK_BYTES // max(1, prod(tensor.shape[1:]) * dtype.itemsize))
    file.seek(offset)
    for rows in tensor.detach().split(step):
        file.write(_bytes(rows.to("cpu", dtype).contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
