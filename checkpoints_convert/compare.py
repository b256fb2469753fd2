"""Compares two models tensor by tensor; each a Hugging Face directory or a Megatron checkpoint.

python -m checkpoints_convert.compare A B         exit code 0: equal, 1: different
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_convert.megatron import MegatronModel, find_checkpoint
from grpo_mcore.checkpoint.folder import LATEST, METADATA
from grpo_mcore.launch import one_line_errors
from grpo_mcore.models.hf_files import HFReader

BLOCK_ELEMENTS = 4 << 20


def open_model(path: Path) -> HFReader | MegatronModel:
    """The model in `path`, whichever kind it is."""
    if (path / LATEST).is_file() or (path / METADATA).is_file():
        return MegatronModel(find_checkpoint(path))
    return HFReader(path)


def compare(a: HFReader | MegatronModel, b: HFReader | MegatronModel) -> tuple[bool, list[str]]:
    """Whether the models have the same tensors of the same values, and what there is to say."""
    first, largest, where = None, 0.0, None
    in_a, in_b = set(a.names), set(b.names)
    types = set()
    for name in tqdm(dict.fromkeys([*a.names, *b.names]), unit="tensor", disable=None):
        difference = None
        if name not in in_a or name not in in_b:
            difference = f"only in {'A' if name in in_a else 'B'}"
        elif a.shape(name) != b.shape(name):
            difference = f"{a.shape(name)} in A, {b.shape(name)} in B"
        else:
            types.add((a.dtype(name), b.dtype(name)))
            distance = largest_difference(a.read(name), b.read(name))
            if distance:
                difference = f"differs by up to {distance:.3g}"
            if distance > largest:
                largest, where = distance, name
        if difference and not first:
            first = f"{name}: {difference}"
    lines = [f"{len(in_a)} tensors in A, {len(in_b)} in B"]
    lines += [f"types: {x} in A, {y} in B" for x, y in sorted(types, key=str) if x != y]
    lines.append(f"largest difference: {largest:.3g}" + (f", in {where}" if where else ""))
    lines.append(f"first difference: {first}" if first else "equal")
    return first is None, lines


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape. What is not a number equals
    itself, and is infinitely far from numbers."""
    largest = 0.0
    for x, y in zip(_blocks(a), _blocks(b), strict=True):
        same = (x == y) | (x.isnan() & y.isnan())
        distance = (x - y).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)
        largest = max(largest, distance.max().item())
    return largest


def _blocks(tensor: Tensor):
    return (block.double() for block in tensor.reshape(-1).split(BLOCK_ELEMENTS) if len(block))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, metavar="A")
    parser.add_argument("b", type=Path, metavar="B")
    arguments = parser.parse_args()
    with one_line_errors():
        equal, lines = compare(open_model(arguments.a), open_model(arguments.b))
    print("\n".join(lines))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
