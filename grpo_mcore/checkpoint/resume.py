"""Which checkpoint a run begins with."""

from collections.abc import Callable
from pathlib import Path

from grpo_mcore.checkpoint import folder, manifest
from grpo_mcore.config.record import CONFIG
from grpo_mcore.errors import ConfigError
from grpo_mcore.parallel.groups import Role

AUTO = "auto"
PARTS = (
    folder.METADATA, folder.COMMON, folder.STATE, CONFIG, f"{folder.COMPANIONS}/config.json",
)  # fmt: skip
"""What no checkpoint of a run can do without, whatever else it has."""


def find_checkpoint(
    resume: str, own: Path, role: Role | None = None
) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` asks for, verified. Collective over `role`, whose ranks share
    the reading; without one only the files' sizes are looked at.

    Args:
        resume: AUTO, a folder of checkpoints (its latest is meant), or one checkpoint.
        own: the run's own folder of checkpoints, for AUTO.

    Returns:
        The checkpoint, None where AUTO finds no valid one; and a line for each newer one that is
        not valid.

    Raises:
        ConfigError: when the one that was named is not valid.
    """
    once: Callable = role.once if role else lambda function: function()
    if resume == AUTO:
        steps = once(lambda: folder.steps_in(own))
        found = [folder.checkpoint_at(own, step) for step in reversed(steps)]
    else:
        found = [once(lambda: _named(Path(resume)))]
    skipped = []
    for checkpoint in found:
        fault = _fault(checkpoint, once, role)
        if fault is None:
            return checkpoint, skipped
        if resume != AUTO:
            raise ConfigError(f"resume={resume}: {checkpoint} is no whole checkpoint: {fault}")
        skipped.append(f"warning: {checkpoint} is passed over: {fault}")
    return None, skipped


def _named(path: Path) -> Path:
    if folder.step_of(path) is not None:
        return path
    latest = path / folder.LATEST
    if not latest.is_file():
        raise ConfigError(
            f"resume={path}: is neither {AUTO}, nor a checkpoint (iter_0000040, for example), "
            f"nor a folder of them with {folder.LATEST}"
        )
    try:
        return folder.checkpoint_at(path, int(latest.read_text()))
    except ValueError as error:
        raise ConfigError(f"resume={path}: {folder.LATEST} holds no number") from error


def _fault(checkpoint: Path, once: Callable, role: Role | None) -> str | None:
    entries = once(lambda: manifest.read_manifest(checkpoint))
    if isinstance(entries, str):
        return entries
    for name in PARTS:
        if name not in entries:
            return f"{manifest.NAME} lists no {name}, which a run's checkpoint has"
    if role is None:
        return manifest.first_fault(checkpoint, entries, with_checksums=False)
    names = sorted(entries)[role.rank :: role.layout.size]
    mine = {name: entries[name] for name in names}
    found = role.all_gather(manifest.first_fault(checkpoint, mine, with_checksums=True))
    return min((fault for fault in found if fault), default=None)
