"""A checkpoint is whole or is not taken for one, and the old ones go as agreed."""

import json
from pathlib import Path

import pytest

from grpo_mcore.checkpoint import folder, manifest


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder of three files and their manifest."""
    directory = folder.checkpoint_at(tmp_path, 40)
    (directory / "hf").mkdir(parents=True)
    for name in ("__0_0.distcp", "common.pt", "hf/config.json"):
        (directory / name).write_text(f"the content of {name}")
    names = ["__0_0.distcp", "common.pt", "hf/config.json"]
    manifest.write_manifest(directory, manifest.describe(directory, names))
    return directory


def fault(checkpoint: Path, with_checksums: bool = True) -> str | None:
    entries = manifest.read_manifest(checkpoint)
    if isinstance(entries, str):
        return entries
    return manifest.first_fault(checkpoint, entries, with_checksums)


def test_a_whole_checkpoint_has_no_fault(checkpoint):
    assert fault(checkpoint) is None
    entry = json.loads((checkpoint / manifest.NAME).read_text())["common.pt"]
    assert entry["size"] == len("the content of common.pt") and len(entry["xxh3"]) == 16


def test_a_fault_is_named(checkpoint):
    shard, config = checkpoint / "__0_0.distcp", checkpoint / "hf" / "config.json"
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"content", b"contend"))
    assert fault(checkpoint) == "__0_0.distcp was altered (its checksum is another)"
    assert fault(checkpoint, with_checksums=False) is None
    shard.write_bytes(content[:-1])
    assert fault(checkpoint) == "__0_0.distcp has 26 bytes for 27"
    assert fault(checkpoint, with_checksums=False) == fault(checkpoint)
    shard.write_bytes(content)
    config.unlink()
    assert fault(checkpoint) == "hf/config.json is missing"


@pytest.mark.parametrize("text", ["", '{"common.pt": {"si', "[1, 2]", '{"common.pt": {"size": 3}}'])
def test_a_damaged_manifest_is_a_fault(checkpoint, text):
    (checkpoint / manifest.NAME).write_text(text)
    assert fault(checkpoint) == "manifest.json is damaged"


def test_without_a_manifest_there_is_no_checkpoint(checkpoint):
    (checkpoint / manifest.NAME).unlink()
    assert fault(checkpoint) == "manifest.json is missing"
    assert fault(checkpoint.with_name("iter_0000041")) == "there is no such folder"


def make(directory: Path, *steps: int) -> None:
    for step in steps:
        folder.checkpoint_at(directory, step).mkdir(parents=True)


def test_only_complete_names_are_checkpoints(tmp_path):
    make(tmp_path, 3, 20)
    folder.start(tmp_path, 40)
    for name in ("iter_0000050.abandoned", "iter_0000050.replaced", "iter_50", "final"):
        (tmp_path / name).mkdir()
    assert folder.steps_in(tmp_path) == [3, 20]
    assert folder.steps_in(tmp_path / "nowhere") == []


def test_a_step_saved_again_replaces_the_old_one_when_it_is_whole(tmp_path):
    make(tmp_path, 20)
    (folder.checkpoint_at(tmp_path, 20) / "old").touch()
    work = folder.start(tmp_path, 20)
    (work / "new").touch()
    assert folder.start(tmp_path, 20) != work
    assert (folder.checkpoint_at(tmp_path, 20) / "old").exists()
    folder.put_in_place(work, folder.checkpoint_at(tmp_path, 20))
    assert [path.name for path in folder.checkpoint_at(tmp_path, 20).iterdir()] == ["new"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    make(tmp_path, 20)
    folder.start(tmp_path, 40)
    (tmp_path / "iter_0000020.replaced").mkdir()
    (tmp_path / "iter_0000030.replaced").mkdir()  # killed before the new one took its place
    folder.clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000020", "iter_0000030"]


def test_newer_checkpoints_are_set_aside(tmp_path):
    make(tmp_path, 10, 20, 30)
    newer = folder.set_aside_after(tmp_path, 10)
    assert [path.name for path in newer] == ["iter_0000020", "iter_0000030"]
    assert folder.steps_in(tmp_path) == [10]
    assert len(list(tmp_path.glob("iter_*.abandoned"))) == 2


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (1, None, [40]),
        (2, None, [30, 40]),
        (9, None, [10, 20, 30, 40]),
        (1, 10, [10, 40]),
        (2, 10, [10, 40]),
        (3, 10, [10, 30, 40]),
        (2, 40, [30, 40]),
        (1, 5, [40]),
    ],
)
def test_the_oldest_go_and_the_best_stays(tmp_path, limit, best, kept):
    """The limit counts the best, as in transformers; what is newer than the step is not counted."""
    make(tmp_path, 10, 20, 30, 40, 90)
    folder.prune(tmp_path, 40, limit, best)
    assert folder.steps_in(tmp_path) == [*kept, 90]
