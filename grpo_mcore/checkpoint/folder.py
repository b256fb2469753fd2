"""The folder of a run's checkpoints, as Megatron-LM lays it out.

    checkpoints/latest_checkpointed_iteration.txt   "40"
    checkpoints/best_checkpointed_iteration.txt     "20": by metric_for_best_model
    checkpoints/iter_0000040/                       a checkpoint, which is complete
    checkpoints/iter_0000040/hf/                    what its model has beside the weights
    checkpoints/iter_0000060.1f3a.partial/          being written, or never finished
    checkpoints/iter_0000060.2b77.abandoned/        newer than the one that a run went back to

Every file and folder gets its name when it is whole.
"""

import os
import re
import secrets
import shutil
from pathlib import Path

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"
COMPANIONS = "hf"
"""The folder of what a Hugging Face model has beside its weights, among a checkpoint's files."""
METADATA, COMMON = ".metadata", "common.pt"
"""Megatron's own records in a checkpoint."""
STATE, TENSORS = "state.json", "tensors.safetensors"
"""The loop's and the trainer's."""
_NAME = re.compile(r"iter_(\d{7,})")


def checkpoint_at(directory: Path, step: int) -> Path:
    return directory / f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for another name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints in `directory`, oldest first."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(step for path in found if (step := step_of(path)) is not None)


def record(directory: Path, name: str, step: int) -> None:
    """Writes `step` into file `name` (LATEST or BEST), all at once."""
    work = directory / f"{name}.partial"
    with work.open("w") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    work.replace(directory / name)


def start(directory: Path, step: int) -> Path:
    """A new folder to write the checkpoint of `step` in. Nothing else has its name, not even a
    process that a killed run has left and that still writes."""
    work = _unique(checkpoint_at(directory, step), "partial")
    work.mkdir(parents=True)
    return work


def put_in_place(work: Path, checkpoint: Path) -> None:
    """Gives the complete folder `work` its name. One that has it already is removed last."""
    replaced = checkpoint.with_name(checkpoint.name + ".replaced")
    if checkpoint.exists():
        checkpoint.rename(replaced)
    work.rename(checkpoint)
    shutil.rmtree(replaced, ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Undoes what a killed run has left half done."""
    for replaced in directory.glob("iter_*.replaced"):
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))
    for leftover in (*directory.glob("iter_*.replaced"), *directory.glob("iter_*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)  # something may write there still


def set_aside_after(directory: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step`, of which a run that goes on from there knows nothing.
    Returns what they were called."""
    newer = [checkpoint_at(directory, s) for s in steps_in(directory) if s > step]
    for checkpoint in newer:
        checkpoint.rename(_unique(checkpoint, "abandoned"))
    return newer


def prune(directory: Path, step: int, limit: int, best: int | None) -> None:
    """Removes the oldest checkpoints up to `step` beyond `limit`, in which `best` is counted but
    never removed; nor is the one of `step`."""
    steps = [s for s in steps_in(directory) if s <= step]
    kept = {step, best} & set(steps)
    for newest in reversed(steps):
        if len(kept) < limit:
            kept.add(newest)
    for old in set(steps) - kept:
        # First its name goes, so that half of it is never taken for the whole.
        removed = checkpoint_at(directory, old)
        removed = removed.rename(_unique(removed, "partial"))
        shutil.rmtree(removed, ignore_errors=True)


def _unique(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.{secrets.token_hex(4)}.{suffix}")
