"""The checkpoints of a run: what is in one, when it is new, which is the best, and who is told."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.resume import AUTO
from grpo_mcore.checkpoint.run import CheckpointWriter, load_checkpoint
from grpo_mcore.checkpoint.start import Start
from grpo_mcore.config import ConfigError, TrainingConfig, trained_model
from grpo_mcore.preflight.batches import is_greater_better
from grpo_mcore.training.policy import Policy, Reference


class Saved(Protocol):
    """What a checkpoint shall hold beside the policy. Called by all ranks."""

    def state(self) -> dict:
        """As JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """The same on all ranks."""


class Saves:
    """Every method is called by all ranks of the trained model's role.

    Attributes:
        done: steps that the checkpoint had made which the run begins with; 0 without one.
        restored: what was saved with it beside the policy, tensors under "tensors".
        callbacks: the state of callbacks in it; None where there is none.
        notes: lines for the user, of what was found.
        lacks_evaluation: whether the newest step was to be evaluated and was not.
        measured: what is known of the newest step, its evaluation too.
        names: of all metrics that there have been.
    """

    def __init__(
        self,
        config: TrainingConfig,
        policy: Policy,
        start: Start,
        runner: CallbackRunner,
        reference: Reference | None = None,
    ):
        """Loads the checkpoint of `start` into `policy` (and `reference`, if it moves)."""
        self.config, self.policy, self.runner = config, policy, runner
        self.reference = reference
        self.is_greater_better = is_greater_better(config)
        self.directory = Path(config.output_dir) / "checkpoints"
        saved = {}
        if start.checkpoint:
            saved = load_checkpoint(policy, start.checkpoint, reference)
        self.done: int = saved.get("step", 0)
        self.restored: dict = saved.get("trainer", {}) | {"tensors": saved.get("tensors", {})}
        self.callbacks: dict | None = saved.get("callbacks")
        self.names = set(saved.get("metric_names", ()))
        self.lacks_evaluation: bool = saved.get("lacks_evaluation", False)
        self.measured: dict[str, float] = {}
        self.best, notes = policy.role.once(lambda: self._ready_folder(saved.get("best")))
        self.notes = [*start.notes, *notes]
        is_own = start.checkpoint == folder.checkpoint_at(self.directory, self.done)
        self.newest = (self.done, self.lacks_evaluation) if is_own else None
        """The step of the run's newest checkpoint, and what that says of its evaluation."""
        self.writer = self._writer_to(self.directory, config)

    def save(self, step: int, session: Saved) -> None:
        """Saves a checkpoint of the run after `step` steps, unless these have one that says the
        same of their evaluation."""
        if self.newest == (step, self.lacks_evaluation):
            return
        self.newest = step, self.lacks_evaluation
        name, measured = self.config.metric_for_best_model, self.measured
        if name in measured and self._is_best(measured[name]):
            self.best = {
                "step": step,
                "metric": name,
                "value": measured[name],
                "greater_is_better": self.is_greater_better,
            }
        best = self.best["step"] if self.best else None
        self.writer.save(step, self._state(session), best, session.tensors())
        self._tell()

    def save_to(self, directory: Path, step: int, session: Saved) -> None:
        """Saves a checkpoint in a folder of the user's."""
        config = replace(self.config, async_save=False, save_total_limit=None)
        writer = self._writer_to(directory, config)
        writer.save(step, self._state(session), None, session.tensors())

    def poll(self) -> None:
        """Completes a save that every rank has written."""
        self.writer.poll()
        self._tell()

    def finish(self) -> None:
        """Waits for a save under way, and completes it."""
        self.writer.finish()
        self._tell()

    def where_engines_fail(self, done: int, session: Saved) -> str:
        """Saves the last step made, the `done`th. Returns what became of it, for the user."""
        if done == 0:
            return "no step was made, so nothing was saved"
        if self.config.save_strategy == "no":
            return f"step {done} was not saved (save_strategy=no)"
        self.save(done, session)
        self.finish()
        return f"step {done} is saved; resume={AUTO} goes on from it"

    def check_metric(self, has_evaluated: bool) -> None:
        """
        Raises:
            ConfigError: when `metric_for_best_model` is none of the metrics there are.
        """
        name = self.config.metric_for_best_model
        if name is None or name in self.names:
            return
        if has_evaluated or not name.startswith("eval_"):
            raise ConfigError(
                f"metric_for_best_model={name}: is not measured; choose one of "
                f"{', '.join(sorted(self.names))}"
            )

    def _writer_to(self, directory: Path, config: TrainingConfig) -> CheckpointWriter:
        return CheckpointWriter(
            self.policy, directory, trained_model(config).path, config, self.reference
        )

    def _state(self, session: Saved) -> dict:
        return {
            "best": self.best,
            "metric_names": sorted(self.names),
            "lacks_evaluation": self.lacks_evaluation,
            "trainer": session.state(),
            "callbacks": self.runner.state_dict(),
        }

    def _tell(self) -> None:
        """Tells callbacks of the checkpoints that have been completed."""
        while self.writer.completed:
            step = self.writer.completed.pop(0)
            best = self.best["step"] if self.best else step
            best_checkpoint = folder.checkpoint_at(self.directory, best)
            self.runner.state.best_model_checkpoint = str(best_checkpoint)
            self.runner.save(folder.checkpoint_at(self.directory, step), step)

    def _ready_folder(self, best: dict | None) -> tuple[dict | None, list[str]]:
        """Makes the run's own folder say what this run knows. Returns the best checkpoint, if it is
        there, and lines for the user."""
        newer = []
        if self.config.resume not in (None, AUTO):
            newer = folder.set_aside_after(self.directory, self.done)
        if folder.checkpoint_at(self.directory, self.done).exists():
            folder.record(self.directory, folder.LATEST, self.done)
        known = (
            best
            and best["metric"] == self.config.metric_for_best_model
            and best["greater_is_better"] == self.is_greater_better
            and folder.checkpoint_at(self.directory, best["step"]).exists()
        )
        if known:
            folder.record(self.directory, folder.BEST, best["step"])
        elif (self.directory / folder.BEST).is_file():
            (self.directory / folder.BEST).unlink()
        return best if known else None, [f"{path} is newer: set aside" for path in newer]

    def _is_best(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        best = self.best["value"]
        return value > best if self.is_greater_better else value < best
