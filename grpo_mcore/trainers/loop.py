"""The loop every trainer shares: steps, callbacks, evaluation, checkpoints, records."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.resume import AUTO, find_checkpoint
from grpo_mcore.checkpoint.run import CheckpointWriter, load_checkpoint
from grpo_mcore.config import ConfigError, ModelConfig, TrainingConfig
from grpo_mcore.config.record import CONFIG, write_config
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.report.names import with_aliases
from grpo_mcore.report.progress import Progress, has_steps
from grpo_mcore.report.result import TrainOutput
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.trainers.batches import is_greater_better
from grpo_mcore.training.policy import Policy, Reference

LATEST = ("learning_rate", "num_tokens", "entropy_coef")
"""Metrics of which the newest value says all."""
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


def trained_section(config: TrainingConfig) -> str:
    """The section of the model that is trained."""
    return "teacher" if hasattr(config, "teacher") else "model"


def trained_model(config: TrainingConfig) -> ModelConfig:
    return getattr(config, trained_section(config))


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


class Loop:
    """Runs `train_step` up to `max_steps`, with callbacks, evaluation and checkpoints between.

    Evaluation runs before the first step, when it is due, and after the last; a checkpoint is
    written when it is due and after the last. Every method is called by all ranks of the role.

    Attributes:
        done: steps made.
        restored: what the trainer gave to be saved with the checkpoint the run begins with, and
            its tensors under "tensors".
        evaluated: the newest evaluation, under "eval_".
        lacks_evaluation: whether the newest step was to be evaluated and was not.
    """

    def __init__(
        self,
        config: TrainingConfig,
        role: Role,
        policy: Policy,
        start: Start,
        shown: dict[str, str],
        runner: CallbackRunner,
        reference: Reference | None = None,
        steps_per_epoch: float | None = None,
    ):
        """Loads the checkpoint of `start` into `policy` (and `reference`, if it moves).

        Args:
            shown: the metrics of a step's line on the terminal, as of Progress.
            steps_per_epoch: None where nobody knows.
        """
        self.config, self.role, self.policy, self.runner = config, role, policy, runner
        self.reference, self.steps_per_epoch = reference, steps_per_epoch
        self.is_greater_better = is_greater_better(config)
        self.since_log: dict[str, list[float]] = {}
        """Metrics of the steps since callbacks were last given any."""
        self.directory = Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        saved = {}
        if start.checkpoint:
            saved = load_checkpoint(policy, start.checkpoint, reference)
        self.done: int = saved.get("step", 0)
        self.restored: dict = saved.get("trainer", {}) | {"tensors": saved.get("tensors", {})}
        self.metric_names = set(saved.get("metric_names", ()))
        self.lacks_evaluation: bool = saved.get("lacks_evaluation", False)
        self.best, notes = role.once(lambda: self._ready_folder(saved.get("best")))
        self.evaluated: dict[str, float] = {}
        self.measured: dict[str, float] = {}
        """What is known of the newest step, its evaluation too."""
        is_own = start.checkpoint == folder.checkpoint_at(self.checkpoints, self.done)
        self.saved = (self.done, self.lacks_evaluation) if is_own else None
        """The step of the run's newest checkpoint, and what that says of its evaluation."""
        self.writer = self._writer_to(self.checkpoints, config)
        epochs = config.num_train_epochs
        if steps_per_epoch:
            epochs = math.ceil(config.max_steps / steps_per_epoch)
        runner.start(config.max_steps, int(epochs), role.rank, role.broadcast)
        if "callbacks" in saved:
            notes = [*notes, *runner.load_state_dict(saved["callbacks"], start.checkpoint)]
        runner.state.global_step = self.done
        self.progress: Progress | None = None
        if role.rank == 0:
            self.progress = Progress(
                self.directory,
                self.done,
                config.max_steps,
                shown,
                resumed=config.resume is not None,
            )
            write_config(self.directory, config)
        for line in (*start.notes, *notes):
            self.say(line)

    def run(
        self,
        train_step: Callable[[int], dict[str, float]],
        evaluate: Callable[[], dict[str, float]] | None,
        state: Callable[[], dict],
        tensors: Callable[[], dict[str, Tensor]] = dict,
        step_recorded: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    ) -> TrainOutput:
        """
        Args:
            evaluate: metrics without their "eval_".
            state: called by all ranks; what to save with a checkpoint, as JSON.
            tensors: what else to save, the same on all ranks.
            step_recorded: called by all ranks with the number of each step, from 1, and its
                metrics, once these are recorded.

        Raises:
            EngineError: when engines cannot be kept alive or given the weights. If checkpoints are
                wanted there is one of the last step made; `train_step` has undone what it changed.

        Returns:
            Its metrics are the last step's, the last evaluation's under "eval_", and
            transformers' `train_runtime` and `train_loss`.
        """
        config, runner, metrics = self.config, self.runner, {}
        evaluates = evaluate is not None and config.eval_strategy != "no"
        saves = config.save_strategy != "no"
        since, losses = time.time(), []

        def act(metrics: dict[str, float], is_last: bool) -> None:
            if runner.should("log"):
                runner.log(self._take_means())
            if evaluates and (runner.should("evaluate") or is_last):
                self.lacks_evaluation = True
                self.evaluated = self.evaluate(evaluate)
                self.lacks_evaluation = False
                self.measured = metrics | self.evaluated
            self.metric_names |= metrics.keys() | self.evaluated.keys()
            self._check_metric(bool(self.evaluated))
            ending = runner.should("training_stop")
            if saves and (runner.should("save") or is_last or ending):
                self.save(state(), tensors())

        if evaluates and (self.done == 0 or self.lacks_evaluation):
            with self._saving_where_engines_fail(state, tensors):
                self.evaluated = self.evaluate(evaluate)
            self.lacks_evaluation, self.measured = False, self.evaluated
            if saves and self.saved:  # the checkpoint is said to lack this, and may be the best
                self.save(state(), tensors())
        runner.train_begin()
        in_epoch = False
        while self.done < config.max_steps:
            if not in_epoch:
                runner.epoch_begin()
                in_epoch = True
            runner.step_begin()
            with self._saving_where_engines_fail(state, tensors):
                metrics = train_step(self.done)
            self.writer.poll()
            self._tell_of_saves()
            self.done += 1
            self.measured = metrics
            epoch = self.epoch(self.done)
            for name, value in metrics.items():
                self.since_log.setdefault(name, []).append(value)
            if "loss" in metrics:
                losses.append(metrics["loss"])
            if self.progress:
                self.progress.step(self.done, with_aliases(metrics))
            step_recorded(self.done, metrics)
            runner.step_end(metrics, epoch)
            is_last = self.done == config.max_steps
            with self._saving_where_engines_fail(state, tensors):
                act(metrics, is_last)
            stops = runner.should("training_stop")
            ends = is_last or stops or runner.should("epoch_stop")
            if ends or int(epoch) > int(self.epoch(self.done - 1)):
                in_epoch = False
                runner.epoch_end(math.ceil(epoch) - 1, metrics)
                with self._saving_where_engines_fail(state, tensors):
                    act(metrics, is_last=False)
            if stops or runner.should("training_stop"):
                break
        self.writer.finish()
        self._tell_of_saves()
        summary = {"train_runtime": time.time() - since}
        if losses:
            summary["train_loss"] = sum(losses) / len(losses)
        output = TrainOutput(
            self.done, summary.get("train_loss", math.nan), metrics | self.evaluated | summary
        )
        runner.log(summary)
        return output

    @contextmanager
    def _saving_where_engines_fail(
        self, state: Callable[[], dict], tensors: Callable[[], dict[str, Tensor]]
    ) -> Iterator[None]:
        """Where engines cannot be kept alive or given the weights, saves the last step made; the
        error tells of that."""
        try:
            yield
        except EngineError as error:
            if self.done == 0:
                outcome = "no step was made, so nothing was saved"
            elif self.config.save_strategy == "no":
                outcome = f"step {self.done} was not saved (save_strategy=no)"
            else:
                self.save(state(), tensors())
                self.writer.finish()
                self._tell_of_saves()
                outcome = f"step {self.done} is saved; resume={AUTO} goes on from it"
            raise type(error)(f"{error}\n{outcome}") from error

    def epoch(self, done: int) -> float:
        """Epochs that `done` steps make."""
        return done / (self.steps_per_epoch or self.config.max_steps)

    def evaluate(
        self, evaluate: Callable[[], dict[str, float]], prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates and tells. Returns the metrics under `prefix` and "_"."""
        metrics = {f"{prefix}_{name}": value for name, value in evaluate().items()}
        if self.progress:
            self.progress.evaluation(self.done, with_aliases(metrics))
        self.runner.evaluate(metrics)
        return metrics

    def log(self, metrics: dict) -> None:
        """Records what a user's own code has measured."""
        record = self.runner.log(metrics)
        if self.progress:
            self.progress.record(self.runner.state.global_step, record)

    def save(self, trainer: dict, tensors: dict[str, Tensor]) -> None:
        """Saves a checkpoint of the run, unless this step has one that says the same of its
        evaluation."""
        if self.saved == (self.done, self.lacks_evaluation):
            return
        self.saved = self.done, self.lacks_evaluation
        name, measured = self.config.metric_for_best_model, self.measured
        if name in measured and self._is_best(measured[name]):
            self.best = {
                "step": self.done,
                "metric": name,
                "value": measured[name],
                "greater_is_better": self.is_greater_better,
            }
        best = self.best["step"] if self.best else None
        self.writer.save(self.done, self._state(trainer), best, tensors)
        self._tell_of_saves()

    def save_to(self, directory: Path, trainer: dict, tensors: dict[str, Tensor]) -> None:
        """Saves a checkpoint in a folder of the user's."""
        config = replace(self.config, async_save=False, save_total_limit=None)
        self._writer_to(directory, config).save(self.done, self._state(trainer), None, tensors)

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def close(self) -> None:
        if self.progress:
            self.progress.close()

    def _writer_to(self, directory: Path, config: TrainingConfig) -> CheckpointWriter:
        return CheckpointWriter(
            self.policy, directory, trained_model(config).path, config, self.reference
        )

    def _state(self, trainer: dict) -> dict:
        return {
            "best": self.best,
            "metric_names": sorted(self.metric_names),
            "lacks_evaluation": self.lacks_evaluation,
            "trainer": trainer,
            "callbacks": self.runner.state_dict(),
        }

    def _tell_of_saves(self) -> None:
        """Tells callbacks of the checkpoints that have been completed."""
        while self.writer.completed:
            step = self.writer.completed.pop(0)
            best = self.best["step"] if self.best else step
            best_checkpoint = folder.checkpoint_at(self.checkpoints, best)
            self.runner.state.best_model_checkpoint = str(best_checkpoint)
            self.runner.save(folder.checkpoint_at(self.checkpoints, step), step)

    def _take_means(self) -> dict[str, float]:
        """Means over the steps since the last time, as in transformers; what counts up, and the
        learning rate, as they are now."""
        taken, self.since_log = self.since_log, {}
        return {
            name: values[-1] if name in LATEST else sum(values) / len(values)
            for name, values in taken.items()
        }

    def _ready_folder(self, best: dict | None) -> tuple[dict | None, list[str]]:
        """Makes the run's own folder say what this run knows. Returns the best checkpoint, if it is
        there, and lines for the user."""
        newer = []
        if self.config.resume not in (None, AUTO):
            newer = folder.set_aside_after(self.checkpoints, self.done)
        if folder.checkpoint_at(self.checkpoints, self.done).exists():
            folder.record(self.checkpoints, folder.LATEST, self.done)
        known = (
            best
            and best["metric"] == self.config.metric_for_best_model
            and best["greater_is_better"] == self.is_greater_better
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

    def _is_best(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        best = self.best["value"]
        return value > best if self.is_greater_better else value < best
