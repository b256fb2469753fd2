"""Megatron's distributed checkpoints ("torch_dist") of a model's weights, read and written by one
process without torch.distributed.

On disk the layers of a model are stacked: parameter "decoder.layers.3.mlp.linear_fc2.weight" is
entry 3 of "decoder.layers.mlp.linear_fc2.weight", and of an expert entry (3, 5). Where layers
differ (some dense, some with experts) each has its own key. Sharding leaves no trace but the
boundaries of the chunks that a tensor is stored in.
"""

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from grpo_mcore.checkpoint.folder import COMMON
from grpo_mcore.checkpoint.pickles import read_entry, read_metadata
from grpo_mcore.errors import FilesError
from grpo_mcore.models.tensor_bytes import read_into

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.*)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_STATELESS = ("word_embeddings.weight", "output_layer.weight", "router.weight")


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in a checkpoint.

    Attributes:
        index: its entry in each of the stacked dimensions, layers and experts.
        stack: the sizes of these dimensions.
    """

    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


def checkpoint_slots(names: Iterable[str]) -> dict[str, Slot]:
    """The slots of all parameters of a model.

    Args:
        names: over the whole model, as Transformer Engine's layers name them.
    """
    names = list(names)
    layers = defaultdict(set)
    for name in names:
        if found := _LAYER.match(name):
            layers[int(found[1])].add(found[2])
    alike = len({frozenset(parts) for parts in layers.values()}) == 1
    experts = 1 + max((int(found[1]) for found in map(_EXPERT.search, names) if found), default=0)

    def slot(name: str) -> Slot:
        key, index, stack = name, (), ()
        if alike and (layer := _LAYER.match(name)):
            key, index, stack = f"decoder.layers.{layer[2]}", (int(layer[1]),), (len(layers),)
        if expert := _EXPERT.search(key):
            key = _EXPERT.sub(".experts.experts.", key)
            index, stack = (*index, int(expert[1])), (*stack, experts)
        return Slot(key, index, stack)

    return {name: slot(name) for name in names}


class TorchDistReader:
    """Reads parameters, whole, from a checkpoint of any layout.

    Args:
        dtype: what they are read as; None: as they are stored.

    Raises:
        FilesError: when a file is missing, truncated or unsafe.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None):
        self.directory, self.cast = directory, dtype
        metadata = read_metadata(directory)
        self.tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.places = metadata.storage_data
        self._check_files()
        self._chunks = cache(self._chunks_by_index)

    def size(self, slot: Slot) -> tuple[int, ...]:
        """The parameter's size; a vocabulary's with its padding.

        Raises:
            FilesError: when there is no such parameter, or another number of its kind.
        """
        found = self._find(slot)
        depth = len(slot.stack)
        if tuple(found.size[:depth]) != slot.stack:
            raise FilesError(
                f"{self.directory}: {slot.key} is a stack of {list(found.size[:depth])}; by "
                f"config.json it is one of {list(slot.stack)}"
            )
        return tuple(found.size[depth:])

    def dtype(self, slot: Slot) -> torch.dtype:
        """What the parameter is read as."""
        return self.cast or self._find(slot).properties.dtype

    def read(self, slot: Slot, size: tuple[int, ...]) -> Tensor:
        """The parameter. `size` is its own, or has fewer rows: those past it are padding."""
        depth = len(slot.index)
        out = torch.empty(size, dtype=self.dtype(slot))
        filled = 0
        for chunk in self._chunks(slot.key, depth).get(slot.index, ()):
            start, extent = chunk.offsets[depth:], chunk.sizes[depth:]
            box = out[tuple(slice(o, o + n) for o, n in zip(start, extent, strict=True))]
            place = self.places[MetadataIndex(slot.key, chunk.offsets)]
            held = read_entry(self.directory, place, slot.key, on="meta")
            if held.numel() != extent.numel() or not held.is_contiguous():
                raise FilesError(f"{self.directory}: {slot.key} is not stored as {list(extent)}")
            data = held.untyped_storage()._checkpoint_offset + held.storage_offset() * held.itemsize
            path = self.directory / place.relative_path
            read_into(box, path, place.offset + data, held.dtype, extent[1:])
            filled += box.numel()
        if filled != out.numel():
            raise FilesError(f"{self.directory}: parts of {slot.key} {slot.index} are missing")
        return out

    def _find(self, slot: Slot) -> TensorStorageMetadata:
        if slot.key not in self.tensors:
            raise FilesError(f"{self.directory}: tensor {slot.key} is missing")
        return self.tensors[slot.key]

    def _chunks_by_index(self, key: str, depth: int) -> dict[tuple, list[ChunkStorageMetadata]]:
        chunks = defaultdict(list)
        for chunk in self.tensors[key].chunks:
            chunks[tuple(chunk.offsets[:depth])].append(chunk)
        return chunks

    def _check_files(self) -> None:
        sizes = {path.name: path.stat().st_size for path in self.directory.iterdir()}
        for index, place in self.places.items():
            if place.relative_path not in sizes:
                raise FilesError(
                    f"{self.directory}: {place.relative_path}, which holds {index.fqn}, is missing"
                )
            if place.offset + place.length > sizes[place.relative_path]:
                raise FilesError(
                    f"{self.directory}: {place.relative_path} is truncated: it ends before "
                    f"{index.fqn} does"
                )


def write_checkpoint(
    directory: Path, expected: dict[str, Tensor], make: Callable[[str], Tensor], common: dict
) -> None:
    """Writes a checkpoint that Megatron's `dist_checkpointing.load` reads at any layout.

    Args:
        directory: must be there.
        expected: every parameter's size and type by its name over the whole model, as a tensor
            without storage (device "meta").
        make: gives the parameter of a name; called when its turn to be written comes.
        common: what else the checkpoint holds; plain values.
    """
    slots = checkpoint_slots(expected)
    items = {name: _tensor_item(slots[name], tensor) for name, tensor in expected.items()}
    states = [_state_item(slot) for slot in slots.values() if _has_state(slot)]
    plan = SavePlan([*states, *items.values()])
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    [plan], metadata = create_default_global_save_plan([writer.prepare_local_plan(plan)])
    [plan] = writer.prepare_global_plan([plan])
    names = {item.index: name for name, item in items.items()}
    try:
        written = writer.write_data(plan, _Lazy(names, make)).wait()
    except RuntimeError as error:
        # When a write fails or is interrupted, torch complains of the hole in its archive.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise
    writer.finish(metadata, [written])
    torch.save(common, directory / COMMON)
    save_config(CheckpointingConfig("torch_dist"), str(directory))


class _Lazy:
    """The part of torch's save planner that its writer uses: data when they are to be written."""

    def __init__(self, names: dict[MetadataIndex, str], make: Callable[[str], Tensor]):
        self.names, self.make = names, make

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        return self.make(self.names[item.index]).view(item.tensor_data.chunk.sizes)


def _tensor_item(slot: Slot, tensor: Tensor) -> WriteItem:
    stack = [1] * len(slot.index)
    chunk = ChunkStorageMetadata(
        offsets=torch.Size([*slot.index, *(0 for _ in tensor.shape)]),
        sizes=torch.Size([*stack, *tensor.shape]),
    )
    data = TensorWriteData(
        chunk=chunk,
        properties=TensorProperties(dtype=tensor.dtype),
        size=torch.Size([*slot.stack, *tensor.shape]),
    )
    index = MetadataIndex(slot.key, chunk.offsets)
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)


def _has_state(slot: Slot) -> bool:
    """Layers have a state of their own beside the weights (FP8 scales). Ours is empty, but Megatron
    refuses a checkpoint that lacks it."""
    return slot.key.endswith(".weight") and not slot.key.endswith(_STATELESS)


def _state_item(slot: Slot) -> WriteItem:
    key = slot.key.removesuffix("weight") + "_extra_state"
    state = ShardedObject(key, None, slot.stack or (1,), slot.index or (0,))
    return WriteItem(MetadataIndex(state.unique_key), WriteItemType.BYTE_IO)
