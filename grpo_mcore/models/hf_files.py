"""Hugging Face model directories: tensors read by slice, and written straight to their places."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo_mcore.errors import FilesError
from grpo_mcore.models.tensor_bytes import read_into, write_from

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 << 30
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.*", "tokenizer_config.json", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What else a model directory holds that a model needs: configuration, tokenizer, chat template."""

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and what it is."""

    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class HFReader:
    """Reads slices of the tensors in a directory of safetensors, sharded or not.

    All headers are read at once, and what they say is checked, so that a damaged model is found
    before the first tensor is wanted.

    Args:
        dtype: what tensors are read as; None: as they are stored.
        file: the one file to read; None: a model's.

    Raises:
        FilesError: for no weights, a missing or truncated file, an index that disagrees.
    """

    def __init__(
        self, directory: str | Path, dtype: torch.dtype | None = None, file: str | None = None
    ):
        self.directory, self.cast = Path(directory), dtype
        index = self.directory / INDEX
        if file:
            self.stored = _read_header(self.directory, file)
        elif (self.directory / SINGLE).is_file():  # transformers, too, prefers it where both are
            self.stored = _read_header(self.directory, SINGLE)
        elif index.is_file():
            self.stored = _read_sharded(self.directory, index)
        else:
            raise FilesError(f"{directory}: no weights there ({SINGLE} or {INDEX})")

    @property
    def names(self) -> list[str]:
        return list(self.stored)

    def shape(self, name: str) -> list[int]:
        return list(self._find(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """What `name` is read as."""
        return self.cast or self._find(name).dtype

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Entries `start` to `stop` of dimension `dim` (0 or 1), in memory of their own."""
        held = self._find(name)
        path, dtype = self.directory / held.file, self.dtype(name)
        if not held.shape:
            out = torch.empty(1, dtype=dtype)
            read_into(out, path, held.offset, held.dtype, ())
            return out[0]
        rows, *row = held.shape
        first, end, _ = slice(start, stop).indices(held.shape[dim])
        if dim == 1:
            out = torch.empty((rows, end - first, *row[1:]), dtype=dtype)
            read_into(out, path, held.offset, held.dtype, row, slice(first, end))
            return out
        out = torch.empty((max(0, end - first), *row), dtype=dtype)
        row_bytes = torch.Size(row).numel() * held.dtype.itemsize
        read_into(out, path, held.offset + first * row_bytes, held.dtype, row)
        return out

    def _find(self, name: str) -> _Stored:
        if name not in self.stored:
            raise FilesError(f"{self.directory}: no tensor {name}")
        return self.stored[name]


def _read_sharded(directory: Path, index: Path) -> dict[str, _Stored]:
    try:
        file_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise FilesError(f"{index}: is not an index of safetensors: {error!r}") from error
    if not all(isinstance(file, str) for file in file_of.values()):
        raise FilesError(f"{index}: is not an index of safetensors: a file's name is no text")
    headers = {file: _read_header(directory, file) for file in sorted(set(file_of.values()))}
    for file, header in headers.items():
        for name in header:
            if file_of.get(name) != file:
                listed = file_of.get(name, "no file")
                raise FilesError(f"{index}: {name} is in {file}, but listed in {listed}")
    for name, file in file_of.items():
        if name not in headers[file]:
            raise FilesError(f"{index}: {name} is listed in {file}, but is not there")
    return {name: headers[file][name] for name, file in file_of.items()}


def _read_header(directory: Path, file: str) -> dict[str, _Stored]:
    path = directory / file
    if not path.is_file():
        raise FilesError(f"{directory}: {file} is missing")
    try:
        with safe_open(path, "pt"):  # checks the header, and the file's length against it
            pass
    except SafetensorError as error:
        raise FilesError(f"{path}: is truncated or no safetensors file: {error}") from error
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _TYPES:
            raise FilesError(f"{path}: {name} is of type {entry['dtype']}, which is not supported")
        offset = _LENGTH_BYTES + length + entry["data_offsets"][0]
        found[name] = _Stored(file, offset, _TYPES[entry["dtype"]], tuple(entry["shape"]))
    return found


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    like: str | Path,
    expected: dict[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model that `from_pretrained` loads, one tensor at a time. The directory is written
    beside its final place and moved there whole; an existing one is replaced.

    Args:
        tensors: names and tensors, in any order, on any device.
        like: directory whose configuration and tokenizer files are copied.
        expected: every tensor's shape and the type to store it in, as a tensor without storage
            (device "meta"), in the order in which they are stored.
        shard_bytes: the most a file holds, unless one tensor exceeds it.

    Raises:
        ValueError: when the tensors are not those expected.
        FilesError: when the disk is full or refuses for another reason; nothing is left then.
    """
    with new_directory(directory, total_bytes(expected)) as work:
        fill_model(tensors, work, like, expected, shard_bytes)


def fill_model(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    like: str | Path,
    expected: dict[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """`write_model` into a directory that is there and empty."""
    copy_companions(like, directory)
    _set_dtype(directory / "config.json", expected)
    shards = _split(expected, shard_bytes)
    file_of, places = {}, {}
    with ExitStack() as stack:
        files = []
        for n, names in enumerate(shards, 1):
            name = f"model-{n:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
            file = stack.enter_context((directory / name).open("wb"))
            files.append(file)
            offset = file.write(_header({tensor: expected[tensor] for tensor in names}))
            for tensor in names:
                file_of[tensor], places[tensor] = name, (file, offset)
                offset += expected[tensor].nbytes
        for name, tensor in tensors:
            if name not in places or tensor.shape != expected[name].shape:
                raise ValueError(f"{directory}: {name} {tuple(tensor.shape)} was not expected")
            write_from(tensor, *places.pop(name), expected[name].dtype)
            del tensor  # before the next is made
        if places:
            raise ValueError(f"{directory}: {next(iter(places))} was never given")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(expected)}, "weight_map": file_of}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def total_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _split(tensors: dict[str, Tensor], shard_bytes: int) -> list[list[str]]:
    """The names of each shard's tensors."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, tensor in tensors.items():
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += tensor.nbytes
    return shards


def _header(tensors: dict[str, Tensor]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data are aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _set_dtype(file: Path, tensors: dict[str, Tensor]) -> None:
    """Says in config.json what most of the weights are; a file that says so already is kept."""
    sizes = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    dtype = str(sizes.most_common(1)[0][0]).removeprefix("torch.")
    config = json.loads(file.read_text())
    if config.get("dtype", config.get("torch_dtype")) != dtype:
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = dtype
        file.write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(like: str | Path, directory: Path) -> None:
    """Copies what the model in `like` has beside its weights into `directory`, which is made."""
    if not (Path(like) / "config.json").is_file():
        raise FilesError(f"{like}: config.json is missing")
    for pattern in COMPANIONS:
        for path in Path(like).glob(pattern):
            target = directory / path.relative_to(like)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


@contextmanager
def new_directory(directory: str | Path, size: int) -> Iterator[Path]:
    """A directory to fill, which takes `directory`'s place, whole, when the block ends without an
    error and vanishes when it ends with one.

    Args:
        size: bytes that will be written.

    Raises:
        FilesError: when the disk has less room than that, or a write fails.
    """
    final = Path(directory).resolve()
    # Names that no one else gives: what lies there is an interrupted process's.
    work = final.with_name(f".{final.name}.being-written")
    replaced = final.with_name(f".{final.name}.being-replaced")
    try:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        for leftover in (work, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        work.mkdir(parents=True)
        free = shutil.disk_usage(work).free
        if size > free:
            raise FilesError(f"{final}: needs {size:,} bytes, and the disk has {free:,} left")
        yield work
        if final.exists():
            final.rename(replaced)
        work.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise FilesError(f"{final}: was not written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
