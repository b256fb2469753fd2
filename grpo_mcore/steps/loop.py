"""The loop every trainer shares: steps, callbacks, evaluation, checkpoints, records."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.checkpoint.start import Start
from grpo_mcore.config import TrainingConfig
from grpo_mcore.config.record import write_config
from grpo_mcore.report.names import with_aliases
from grpo_mcore.report.progress import Progress
from grpo_mcore.report.result import TrainOutput
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.steps.saves import Saves
from grpo_mcore.training.policy import Policy, Reference

LATEST = ("learning_rate", "num_tokens", "entropy_coef")
"""Metrics of which the newest value says all."""


class Steps(ABC):
    """What the loop runs. Its methods are called by all ranks of the trained model's role."""

    evaluates: bool
    """Whether there is anything to evaluate on."""

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """Optimizer step `step` (from 0). Returns its metrics.

        Raises:
            EngineError: when engines cannot be kept alive; what the step has changed is undone.
        """

    @abstractmethod
    def evaluate(self, datasets: dict | None = None) -> dict[str, float]:
        """Metrics, without "eval_".

        Args:
            datasets: of the kind the trainer's `_open_evals` gives; None: the trainer's own.
        """

    def state(self) -> dict:
        """What a checkpoint shall hold beside the policy, as JSON."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """And as tensors, the same on all ranks."""
        return {}

    def step_recorded(self, step: int, metrics: dict[str, float]) -> None:  # noqa: B027
        """After the record of step `step` (from 1) and its line on the terminal."""


class Loop:
    """Runs steps up to `max_steps`, with callbacks, evaluation and checkpoints between.

    Evaluation runs before the first step, when it is due, and after the last; a checkpoint is
    written when it is due and after the last. Every method is called by all ranks of the role.

    Attributes:
        done: steps made.
        restored: what was saved with the checkpoint the run begins with (`Saves`).
        evaluated: the newest evaluation, under "eval_".
    """

    def __init__(
        self,
        config: TrainingConfig,
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
        self.config, self.runner, self.steps_per_epoch = config, runner, steps_per_epoch
        self.since_log: dict[str, list[float]] = {}
        """Metrics of the steps since callbacks were last given any."""
        self.directory, role = Path(config.output_dir), policy.role
        self.saves = Saves(config, policy, start, runner, reference)
        self.done, self.restored = self.saves.done, self.saves.restored
        self.evaluated: dict[str, float] = {}
        epochs = config.num_train_epochs
        if steps_per_epoch:
            epochs = math.ceil(config.max_steps / steps_per_epoch)
        runner.start(config.max_steps, int(epochs), role.rank, role.broadcast)
        notes = self.saves.notes
        if self.saves.callbacks:
            notes = [*notes, *runner.load_state_dict(self.saves.callbacks, start.checkpoint)]
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
        for line in notes:
            self.say(line)

    def run(self, session: Steps) -> TrainOutput:
        """
        Raises:
            EngineError: when engines cannot be kept alive or given the weights. If checkpoints are
                wanted there is one of the last step made.

        Returns:
            Its metrics are the last step's, the last evaluation's under "eval_", and
            transformers' `train_runtime` and `train_loss`.
        """
        since, losses = time.time(), []
        try:
            metrics = self._run(session, losses)
        except EngineError as error:
            outcome = self.saves.where_engines_fail(self.done, session)
            raise type(error)(f"{error}\n{outcome}") from error
        self.saves.finish()
        summary = {"train_runtime": time.time() - since}
        if losses:
            summary["train_loss"] = sum(losses) / len(losses)
        output = TrainOutput(
            self.done, summary.get("train_loss", math.nan), metrics | self.evaluated | summary
        )
        self.runner.log(summary)
        return output

    def _run(self, session: Steps, losses: list[float]) -> dict[str, float]:
        """Returns the last step's metrics, and adds every step's loss to `losses`."""
        config, runner, metrics = self.config, self.runner, {}
        if self._evaluates(session) and (self.done == 0 or self.saves.lacks_evaluation):
            self._evaluate_run(session, {})
            if self._saves and self.saves.newest:  # it is said to lack this, and may be the best
                self.saves.save(self.done, session)
        runner.train_begin()
        in_epoch = False
        while self.done < config.max_steps:
            if not in_epoch:
                runner.epoch_begin()
                in_epoch = True
            runner.step_begin()
            metrics = session.train_step(self.done)
            self.saves.poll()
            self.done += 1
            epoch = self._epoch(self.done)
            self._record(metrics)
            if "loss" in metrics:
                losses.append(metrics["loss"])
            session.step_recorded(self.done, metrics)
            runner.step_end(metrics, epoch)
            is_last = self.done == config.max_steps
            self._act(session, metrics, is_last)
            stops = runner.should("training_stop")
            ends = is_last or stops or runner.should("epoch_stop")
            if ends or int(epoch) > int(self._epoch(self.done - 1)):
                in_epoch = False
                runner.epoch_end(math.ceil(epoch) - 1, metrics)
                self._act(session, metrics, is_last=False)
            if stops or runner.should("training_stop"):
                break
        return metrics

    def _record(self, metrics: dict[str, float]) -> None:
        """Of the newest step."""
        self.saves.measured = metrics
        for name, value in metrics.items():
            self.since_log.setdefault(name, []).append(value)
        if self.progress:
            self.progress.step(self.done, with_aliases(metrics))

    def _act(self, session: Steps, metrics: dict[str, float], is_last: bool) -> None:
        """Logs, evaluates and saves, where callbacks want it or the run ends."""
        runner, saves = self.runner, self.saves
        if runner.should("log"):
            runner.log(self._take_means())
        if self._evaluates(session) and (runner.should("evaluate") or is_last):
            self._evaluate_run(session, metrics)
        saves.names |= metrics.keys() | self.evaluated.keys()
        saves.check_metric(bool(self.evaluated))
        ending = runner.should("training_stop")
        if self._saves and (runner.should("save") or is_last or ending):
            saves.save(self.done, session)

    def _evaluate_run(self, session: Steps, metrics: dict[str, float]) -> None:
        """The evaluation that the newest step, of these metrics, is due."""
        self.saves.lacks_evaluation = True
        self.evaluated = self.evaluate(session.evaluate)
        self.saves.lacks_evaluation = False
        self.saves.measured = metrics | self.evaluated

    def _evaluates(self, session: Steps) -> bool:
        return session.evaluates and self.config.eval_strategy != "no"

    @property
    def _saves(self) -> bool:
        return self.config.save_strategy != "no"

    def _epoch(self, done: int) -> float:
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

    def say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def close(self) -> None:
        if self.progress:
            self.progress.close()

    def _take_means(self) -> dict[str, float]:
        """Means over the steps since the last time, as in transformers; what counts up, and the
        learning rate, as they are now."""
        taken, self.since_log = self.since_log, {}
        return {
            name: values[-1] if name in LATEST else sum(values) / len(values)
            for name, values in taken.items()
        }
