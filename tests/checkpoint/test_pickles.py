"""No code from a checkpoint is run, by our reader or, after `check_pickles`, by Megatron's."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from checkpoints_convert import hf_to_megatron
from grpo_mcore.checkpoint.pickles import COMMON, METADATA, check_pickles, read_metadata
from grpo_mcore.errors import FilesError


class Runs:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def whole(tiny_models, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "megatron"
    hf_to_megatron.convert(tiny_models / "llama", directory, None, False)
    return directory / "iter_0000000"


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def poison_metadata(checkpoint: Path, code: Runs) -> bytes:
    metadata = read_metadata(checkpoint)
    metadata.planner_data = code
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    return pickle.dumps(code)


def poison_common(checkpoint: Path, code: Runs) -> bytes:
    torch.save({"iteration": code}, checkpoint / COMMON)
    return pickle.dumps(code)


def poison_common_as_a_plain_pickle(checkpoint: Path, code: Runs) -> bytes:
    (checkpoint / COMMON).write_bytes(pickle.dumps(code))
    return pickle.dumps(code)


def poison_an_object(checkpoint: Path, code: Runs) -> bytes:
    metadata = read_metadata(checkpoint)
    objects = metadata.state_dict_metadata.items()
    name = next(name for name, kind in objects if isinstance(kind, BytesStorageMetadata))
    archive = io.BytesIO()
    torch.save([code], archive)
    (checkpoint / "__9_0.distcp").write_bytes(archive.getvalue())
    place = metadata.storage_data[MetadataIndex(name)]
    place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(archive.getvalue())
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    return pickle.dumps(code)


def test_sound_checkpoint_passes(checkpoint):
    check_pickles(checkpoint)


@pytest.mark.parametrize(
    "poison",
    [poison_metadata, poison_common, poison_common_as_a_plain_pickle, poison_an_object],
)
def test_code_is_named_and_not_run(checkpoint, tmp_path, poison):
    trace = tmp_path / "trace"
    code = poison(checkpoint, Runs(trace))
    with pytest.raises(FilesError, match="nothing of it was run"):
        check_pickles(checkpoint)
    assert not trace.exists()
    pickle.loads(code)
    assert trace.exists()


def test_name_reached_through_an_allowed_module_is_refused(checkpoint):
    """Pickles may name an attribute of an attribute."""
    code = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93."
    (checkpoint / METADATA).write_bytes(code)
    with pytest.raises(FilesError, match=r"refers to torch\.os\.system"):
        read_metadata(checkpoint)


@pytest.mark.parametrize("file", [METADATA, COMMON])
@pytest.mark.parametrize("size", [0, 50, -50])
def test_damaged_file_is_named(checkpoint, file, size):
    (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:size])
    with pytest.raises(FilesError, match=rf"{file}: is damaged"):
        check_pickles(checkpoint)


@pytest.mark.parametrize("file", [METADATA, COMMON])
def test_missing_file_is_named(checkpoint, file):
    (checkpoint / file).unlink()
    with pytest.raises(FilesError, match=rf"{file} is missing"):
        check_pickles(checkpoint)


def test_encoded_entries_are_refused(checkpoint):
    """Torch decodes them first, so they could be one thing here and another there."""
    metadata = read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(FilesError, match="is encoded, which a checkpoint of ours never is"):
        check_pickles(checkpoint)


def test_an_entry_that_lies_nowhere_is_named(checkpoint):
    metadata = read_metadata(checkpoint)
    lost = next(iter(metadata.storage_data))
    del metadata.storage_data[lost]
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(FilesError, match=f"does not say where {lost.fqn} lies"):
        check_pickles(checkpoint)
