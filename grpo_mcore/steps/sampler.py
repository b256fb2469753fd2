"""What a GRPO step asks of whoever samples for it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from grpo_mcore.config import GroupConfig
from grpo_mcore.report.progress import Progress
from grpo_mcore.rewards import Scores
from grpo_mcore.rollout.samples import Rollouts


class Sampler(ABC):
    """Every method is called by all ranks of the policy's role, with the same arguments. The same
    `key` gives the same samples."""

    shown: ClassVar[dict[str, str]]
    """What the lines on the terminal show (`report.progress.Progress`)."""
    evaluates: bool
    """Whether there is anything to evaluate on."""

    @abstractmethod
    def roll_out(self, numbers: list[int], key: str) -> Rollouts:
        """`num_generations` samples of each of the dataset's rows `numbers`."""

    @abstractmethod
    def roll_out_given(self, rows: Sequence[dict]) -> Rollouts:
        """Samples of rows that are not of the run's own dataset."""

    def look_ahead(self, numbers: list[int], key: str) -> None:  # noqa: B027
        """Called when a generation's samples are there, before the trainer trains on them, with the
        next one's rows and key."""

    def describe(self, rollouts: Rollouts, metrics: dict[str, float]) -> dict[str, float]:
        """Further metrics of samples that have `metrics`."""
        return {}

    @abstractmethod
    def evaluate(self, datasets: dict[str, Any] | None, step: int) -> dict[str, float]:
        """Metrics after `step` steps, without "eval_".

        Args:
            datasets: None: the run's own.
        """

    @abstractmethod
    def record(
        self, progress: Progress, step: int, rollouts: Rollouts, scores: Scores, rewards: Tensor
    ) -> None:
        """Writes down some of the samples. On rank 0 only.

        Args:
            rewards: [samples], those of all functions together.
        """

    def step_ended(self, metrics: dict[str, float]) -> dict[str, float]:
        """Further metrics of a step that has `metrics`."""
        return {}

    def state(self) -> dict:
        """What a checkpoint shall hold, as JSON."""
        return {}

    def restore(self, saved: dict) -> None:  # noqa: B027
        """Goes on from `state`; of a new run it is empty."""

    def boundary(self) -> Callable[[], None]:
        """What takes the sampler back to where it is now."""
        return lambda: None

    def run_ended(self, directory: Path) -> str | None:  # noqa: B027
        """Called on rank 0 when the trained model is written to the run's `directory`. Returns a
        line for the user, if there is one."""

    def rest(self) -> None:  # noqa: B027
        """Nothing more is asked for the time being."""


def recorded(config: GroupConfig, count: int) -> int:
    """How many of a step's `count` completions are written down."""
    asked = config.log_completions
    return count if asked is True else min(count, int(asked))
