"""Where a run begins: anew, or from a checkpoint that its settings allow."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.resume import AUTO, find_checkpoint
from grpo_mcore.config import ConfigError, TrainingConfig, trained_section
from grpo_mcore.config.record import CONFIG
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.report.progress import has_steps

FIXED = ("distributed_optimizer", "peft_config", "sync_ref_model", "dtype")
"""Settings that what a checkpoint holds depends on; the last is the trained model's."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: from `checkpoint`, or anew. `notes` are lines for the user."""

    checkpoint: Path | None
    notes: list[str]


ANEW = Start(None, [])


def choose_start(config: TrainingConfig, role: Role | None = None) -> Start:
    """Refuses to write over an earlier run, and finds the checkpoint to go on from, if any.
    Collective over `role`; without one, checkpoints are looked at but not read, nor is anything
    that a killed run has left cleared away.

    Raises:
        ConfigError: naming output_dir, resume, or a setting that the checkpoint does not allow.
    """
    once: Callable = role.once if role else lambda function: function()
    directory = Path(config.output_dir)
    own = directory / "checkpoints"
    is_used = once(lambda: has_steps(directory) or bool(folder.steps_in(own)))
    if config.resume is None:
        if is_used:
            raise ConfigError(
                f"output_dir={directory}: holds an earlier run; choose another, or resume={AUTO} "
                "to go on"
            )
        return ANEW
    if role:
        role.once(lambda: folder.clear_leftovers(own))
    checkpoint, notes = find_checkpoint(config.resume, own, role)
    if checkpoint is None and notes:
        raise ConfigError(
            f"resume={AUTO}: no checkpoint in {own} is whole "
            f"({notes[0].removeprefix('warning: ')}); restore one, or choose another output_dir"
        )
    if checkpoint is None:
        return Start(None, [f"resume={AUTO}: no checkpoint in {own}: from the beginning"])
    saved = once(lambda: yaml.safe_load((checkpoint / CONFIG).read_text()))
    is_own = checkpoint.resolve().parent == own.resolve()
    if is_used and not is_own and Path(saved["output_dir"]).resolve() != directory.resolve():
        raise ConfigError(
            f"output_dir={directory}: holds an earlier run, of which {checkpoint} is no part; "
            "choose another"
        )
    step = folder.step_of(checkpoint)
    if step > config.max_steps:
        raise ConfigError(f"max_steps={config.max_steps}: {checkpoint} is at step {step}")
    _check_fixed(config, checkpoint, saved)
    return Start(checkpoint, [*notes, f"going on from {checkpoint}"])


def _check_fixed(config: TrainingConfig, checkpoint: Path, saved: dict) -> None:
    section = trained_section(config)
    now = asdict(config)
    if section not in saved:
        raise ConfigError(f"resume={config.resume}: {checkpoint} is of another kind of trainer")
    for name in FIXED:
        key = f"{section}.{name}" if name == "dtype" else name
        value, was = ((c[section] if name == "dtype" else c).get(name) for c in (now, saved))
        if value != was:
            raise ConfigError(f"{key}={value}: {checkpoint} was saved with {key}={was}")
    path = now[section]["path"]
    key = f"{section}.path"
    if read_shape(key, path) != read_shape(key, str(checkpoint / folder.COMPANIONS)):
        raise ConfigError(
            f"{key}={path}: another model than the one in {checkpoint}, which came from "
            f"{saved[section]['path']}"
        )
