"""Reads the pickles in a checkpoint without running code from them.

Both torch's and Megatron's readers call plain `pickle.load` on `.metadata`, and torch loads the
objects between the tensors with `weights_only=False`; so `check_pickles` goes first. (`common.pt`
and the tensors they load safely by themselves.)
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from grpo_mcore.checkpoint.folder import COMMON, METADATA
from grpo_mcore.errors import FilesError

_CHECKPOINT, _MEGATRON = (
    "torch.distributed.checkpoint",
    "megatron.core.dist_checkpointing.strategies.torch",
)
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _MEGATRON: {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"PosixPath"},
    "torch": {"Size", *(name for name, v in vars(torch).items() if isinstance(v, torch.dtype))},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip
"""All that a `.metadata` refers to: plain records, and names of types."""


def check_pickles(directory: Path) -> None:
    """Reads every pickle of the checkpoint `directory` but those of its tensors.

    Raises:
        FilesError: naming the file, when one is damaged or refers to what it has no use for.
    """
    metadata = read_metadata(directory)
    read_common(directory)
    for name, kind in metadata.state_dict_metadata.items():
        if isinstance(kind, BytesStorageMetadata):
            read_entry(directory, metadata.storage_data[MetadataIndex(name)], name)


def read_metadata(directory: Path) -> Metadata:
    """Torch's description of the checkpoint in `directory`; see `check_pickles` for errors."""
    path = directory / METADATA
    if not path.is_file():
        raise FilesError(f"{directory}: {METADATA} is missing")
    with path.open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except FilesError as error:
            raise FilesError(f"{path}: {error}; nothing of it was run") from error
        except Exception as error:  # bytes that are no pickle can make it raise anything
            raise FilesError(f"{path}: is damaged: {error!r}") from error
    tensors, places = (
        getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data")
    )
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise FilesError(f"{path}: describes no checkpoint")
    for index, place in places.items():
        if getattr(place, "transform_descriptors", None):
            # Torch would decode it before unpickling, so what is checked here is not what it loads.
            raise FilesError(f"{path}: {index.fqn} is encoded, which a checkpoint of ours never is")
    for name, kind in tensors.items():
        chunks = [None] if isinstance(kind, BytesStorageMetadata) else kind.chunks
        for chunk in chunks:
            if MetadataIndex(name, chunk and chunk.offsets) not in places:
                raise FilesError(f"{path}: does not say where {name} lies")
    return metadata


def read_common(directory: Path) -> dict[str, Any]:
    """The checkpoint's common state; see `check_pickles` for errors."""
    path = directory / COMMON
    if not path.is_file():
        raise FilesError(f"{directory}: {COMMON} is missing")
    with path.open("rb") as file:
        common = _load(file, str(path))
    if not isinstance(common, dict):
        raise FilesError(f"{path}: holds no common state")
    return common


def read_entry(directory: Path, place: _StorageInfo, name: str, on: str = "cpu") -> Any:
    """The object or tensor `name`, which lies at `place`; see `check_pickles` for errors.

    Args:
        on: the device; "meta" reads no data, and the tensor's storage knows at which byte of
            `place` they are (`_checkpoint_offset`).
    """
    path = directory / place.relative_path
    with path.open("rb") as file:
        view = _create_file_view(file, place.offset, place.length)
        return _load(view, f"{path}: {name}", on)


def _load(file, where: str, on: str = "cpu") -> Any:
    try:
        return torch.load(file, map_location=on, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            str(error.__context__ or error).split("\n")[0].rstrip(".")
        )  # the rest is how to run it
        raise FilesError(f"{where}: {reason}; nothing of it was run") from error
    except Exception as error:  # bytes that are no archive can make it raise anything
        raise FilesError(f"{where}: is damaged: {error}") from error


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _ALLOWED.get(module, ()):
            raise FilesError(f"refers to {module}.{name}, which a checkpoint has no use for")
        return super().find_class(module, name)
