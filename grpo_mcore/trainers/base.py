"""The loop every reinforcement trainer shares: steps, evaluation, checkpoints, records."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import yaml

from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.resume import AUTO, find_checkpoint
from grpo_mcore.checkpoint.run import CONFIG, CheckpointWriter, load_checkpoint
from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.report.progress import Progress
from grpo_mcore.training.policy import Policy

FIXED = ("distributed_optimizer", "teacher.dtype")
"""Settings that a checkpoint's optimizer states depend on."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: from `checkpoint`, or anew. `notes` are lines for the user."""

    checkpoint: Path | None
    notes: list[str]


ANEW = Start(None, [])


def choose_start(config: TeacherGRPOConfig, role: Role | None = None) -> Start:
    """Refuses to write over an earlier run, and finds the checkpoint to go on from, if any.
    Collective over `role`; without one, checkpoints are looked at but not read, nor is anything
    that a killed run has left cleared away.

    Raises:
        ConfigError: naming output_dir, resume, or a setting that the checkpoint does not allow.
    """
    once: Callable = role.once if role else lambda function: function()
    directory = Path(config.output_dir)
    own = directory / "checkpoints"
    is_used = once(lambda: (directory / "metrics.jsonl").exists() or bool(folder.steps_in(own)))
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
    if is_used and checkpoint.resolve().parent != own.resolve():
        raise ConfigError(
            f"output_dir={directory}: holds an earlier run, of which {checkpoint} is no part; "
            "choose another"
        )
    step = folder.step_of(checkpoint)
    if step > config.max_steps:
        raise ConfigError(f"max_steps={config.max_steps}: {checkpoint} is at step {step}")
    _check_fixed(config, checkpoint)
    return Start(checkpoint, [*notes, f"going on from {checkpoint}"])


def _check_fixed(config: TeacherGRPOConfig, checkpoint: Path) -> None:
    saved = yaml.safe_load((checkpoint / CONFIG).read_text())
    for key in FIXED:
        value, was = attrgetter(key)(config), saved
        for name in key.split("."):
            was = was[name]
        if value != was:
            raise ConfigError(f"{key}={value}: {checkpoint} was saved with {key}={was}")
    path = config.teacher.path
    if read_shape("teacher.path", path) != read_shape(
        "teacher.path", str(checkpoint / folder.COMPANIONS)
    ):
        raise ConfigError(
            f"teacher.path={path}: another model than the one in {checkpoint}, which came from "
            f"{saved['teacher']['path']}"
        )


class Loop:
    """Runs `train_step` from `first_step` to `max_steps`, with evaluation and checkpoints between.

    Evaluation runs before the first step, every `eval_steps` and after the last; a checkpoint is
    written every `save_steps` and after the last.

    Attributes:
        restored: what the trainer gave to be saved with the checkpoint the run begins with.
    """

    def __init__(
        self,
        config: TeacherGRPOConfig,
        role: Role,
        policy: Policy,
        model_path: str,
        start: Start,
        shown: dict[str, str],
    ):
        """Loads the checkpoint of `start` into `policy`, which came from `model_path`."""
        self.config, self.role = config, role
        self.directory = Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        saved = load_checkpoint(policy, start.checkpoint) if start.checkpoint else {}
        self.first_step: int = saved.get("step", 0)
        self.restored: dict = saved.get("trainer", {})
        self.metric_names = set(saved.get("metric_names", ()))
        self.best, notes = role.once(lambda: self._ready_folder(saved.get("best")))
        self.writer = CheckpointWriter(policy, self.checkpoints, model_path, config)
        self.progress: Progress | None = None
        if role.rank == 0:
            self.progress = Progress(
                self.directory,
                self.first_step,
                config.max_steps,
                shown,
                resumed=config.resume is not None,
            )
        for line in (*start.notes, *notes):
            self.say(line)

    def run(
        self,
        train_step: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None,
        state: Callable[[], dict],
    ) -> dict[str, float]:
        """
        Args:
            state: called by all ranks; what to save with a checkpoint, as JSON.

        Returns:
            The last step's metrics, with the last evaluation's under "eval_".
        """
        config, metrics, evaluated = self.config, {}, {}
        if evaluate and self.first_step == 0:
            evaluated = self._evaluate(0, evaluate)
        for step in range(self.first_step, config.max_steps):
            metrics = train_step(step)
            self.writer.poll()
            done = step + 1
            if self.progress:
                self.progress.step(done, metrics)
            last = done == config.max_steps
            measured = metrics
            if evaluate and (last or _is_due(done, config.eval_steps)):
                evaluated = self._evaluate(done, evaluate)
                measured = metrics | evaluated
            self.metric_names |= metrics.keys() | evaluated.keys()
            self._check_metric(bool(evaluated))
            if last or _is_due(done, config.save_steps):
                self._save(done, measured, state())
        self.writer.finish()
        return metrics | evaluated

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def close(self) -> None:
        if self.progress:
            self.progress.close()

    def _evaluate(self, step: int, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        metrics = evaluate()
        if self.progress:
            self.progress.evaluation(step, metrics)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _ready_folder(self, best: dict | None) -> tuple[dict | None, list[str]]:
        """Makes the run's own folder say what this run knows. Returns the best checkpoint, if it is
        there, and lines for the user."""
        newer = []
        if self.config.resume not in (None, AUTO):
            newer = folder.set_aside_after(self.checkpoints, self.first_step)
        if folder.checkpoint_at(self.checkpoints, self.first_step).exists():
            folder.record(self.checkpoints, folder.LATEST, self.first_step)
        known = (
            best
            and best["metric"] == self.config.metric_for_best_model
            and best["greater_is_better"] == self.config.greater_is_better
            and folder.checkpoint_at(self.checkpoints, best["step"]).exists()
        )
        if known:
            folder.record(self.checkpoints, folder.BEST, best["step"])
        elif (self.checkpoints / folder.BEST).is_file():
            (self.checkpoints / folder.BEST).unlink()
        return best if known else None, [f"{path} is newer: set aside" for path in newer]

    def _check_metric(self, evaluated: bool) -> None:
        """Raises ConfigError when `metric_for_best_model` is none of the metrics there are."""
        name = self.config.metric_for_best_model
        if name is None or name in self.metric_names:
            return
        if evaluated or not name.startswith("eval_"):
            raise ConfigError(
                f"metric_for_best_model={name}: is not measured; choose one of "
                f"{', '.join(sorted(self.metric_names))}"
            )

    def _save(self, step: int, measured: dict[str, float], trainer: dict) -> None:
        name = self.config.metric_for_best_model
        if name in measured and self._is_best(measured[name]):
            self.best = {
                "step": step,
                "metric": name,
                "value": measured[name],
                "greater_is_better": self.config.greater_is_better,
            }
        state = {
            "best": self.best,
            "metric_names": sorted(self.metric_names),
            "trainer": trainer,
        }
        self.writer.save(step, state, self.best["step"] if self.best else None)

    def _is_best(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        best = self.best["value"]
        return value > best if self.config.greater_is_better else value < best


def _is_due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
