"""What the conversion commands have in common: arguments, output directories, progress, proof."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash
from torch import Tensor
from tqdm import tqdm

from grpo_mcore.config import ConfigError
from grpo_mcore.errors import FilesError
from grpo_mcore.launch import one_line_errors
from grpo_mcore.models.layers import DTYPES
from grpo_mcore.rollout.bucket import checksum


def parse(description: str, source: str) -> argparse.Namespace:
    """Reads the command line: --SOURCE, --output, --dtype, --check, --force."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{source}", type=Path, required=True, dest="source", metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="what tensors are stored as; default: what they are now"
    )
    parser.add_argument("--check", action="store_true", help="read back and compare, bit for bit")
    parser.add_argument("--force", action="store_true", help="replace an output that is there")
    arguments = parser.parse_args()
    arguments.dtype = DTYPES.get(arguments.dtype)
    return arguments


def run(description: str, source: str, convert: Callable) -> None:
    """A conversion command: `convert(source, output, dtype, check)` as the command line says."""
    arguments = parse(description, source)
    with one_line_errors():
        check_output(arguments.output, arguments.source, arguments.force)
        convert(arguments.source, arguments.output, arguments.dtype, arguments.check)
    print(f"written: {arguments.output}")


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuses to write over anything unless told to, and over the source even then.

    Raises:
        ConfigError: naming the output.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output={output}: is a file; give a directory")
    if output.is_mount():
        raise ConfigError(f"--output={output}: is a mount point; give a directory in it")
    if not force and output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output={output}: is not empty; choose another, or --force")
    if source.resolve().is_relative_to(output.resolve()):
        raise ConfigError(f"--output={output}: holds the source, {source}; choose another")


def progress(what: str, tensors: dict[str, Tensor]) -> tqdm:
    """A bar over the bytes of `tensors`; it is shown on a terminal only."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)


def prove(
    names: Iterable[str],
    source: Callable[[str], Tensor],
    returned: Callable[[str], Tensor],
    bar: tqdm,
) -> str:
    """Compares the tensors `names` of the source with what came back of them, by checksum.

    Returns:
        A line saying how many were compared, with a checksum over all.

    Raises:
        FilesError: naming the first that differs.
    """
    names, total = list(names), xxhash.xxh3_128()
    for name in names:
        expected = checksum(source(name))
        tensor = returned(name)
        found = checksum(tensor)
        bar.update(tensor.nbytes)
        del tensor  # before the next is read
        if found != expected:
            raise FilesError(f"check: {name} is {expected} in the source and came back as {found}")
        total.update(f"{name} {found}\n".encode())
    return f"checked {len(names)} tensors: identical (xxh3 {total.hexdigest()})"
