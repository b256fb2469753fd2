"""Hugging Face model directories: tensors read by slice, and written shard by shard."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class HFReader:
    """Reads slices of the tensors in a directory of safetensors, sharded or not, as `dtype`."""

    def __init__(self, directory: str | Path, dtype: torch.dtype):
        self.directory, self.dtype = Path(directory), dtype
        index = self.directory / INDEX
        if index.exists():
            self.file_of = json.loads(index.read_text())["weight_map"]
        elif (self.directory / SINGLE).exists():
            with safe_open(self.directory / SINGLE, "pt") as file:
                self.file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{directory}: neither {SINGLE} nor {INDEX} is there")
        self.open_files = {}

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        held = self._slice(name)
        if dim == 1:
            return held[:, start:stop].to(self.dtype)
        return held[start:stop].to(self.dtype)

    def _slice(self, name: str):
        if name not in self.file_of:
            raise KeyError(f"{self.directory}: no tensor {name!r}")
        file = self.file_of[name]
        if file not in self.open_files:
            self.open_files[file] = safe_open(self.directory / file, "pt")
        return self.open_files[file].get_slice(name)


def write_model(
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    like: str | Path,
    dtype: torch.dtype,
    shard_bytes: int = 4 << 30,
) -> None:
    """Writes a model that `from_pretrained` loads, holding at most `shard_bytes` of it at a time.

    The directory is written beside its final place and moved there whole.

    Args:
        tensors: names and tensors, in the order in which they are stored.
        like: directory whose configuration and tokenizer files are copied.
        dtype: written into config.json.
    """
    final = Path(directory)
    work = final.with_name(final.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in _COPIED:
        if (Path(like) / name).exists():
            shutil.copy(Path(like) / name, work / name)
    config = json.loads((work / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    shards, held, held_bytes, total = [], {}, 0, 0

    def flush() -> None:
        shards.append(list(held))
        save_file(held, work / f"shard-{len(shards)}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        held[name] = tensor.detach().cpu().contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (work / "shard-1").rename(work / SINGLE)
    else:
        weight_map = {}
        for n, names in enumerate(shards, 1):
            file = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
            (work / f"shard-{n}").rename(work / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (work / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
