"""What lives while a trainer's processes work together: on the ranks that train, and on others."""

from abc import ABC, abstractmethod

from grpo_mcore.models.shape import ModelShape
from grpo_mcore.steps.loop import Loop, Steps
from grpo_mcore.training.policy import Policy


class Session(Steps):
    """What a trainer holds while its processes work together: models, optimizer, engines. Its
    methods are called by all ranks of the trained model's role."""

    policy: Policy
    shape: ModelShape
    loop: Loop

    def run_ended(self) -> None:
        """After the trained model is written."""

    def rest(self) -> None:
        """After each of the trainer's methods: nothing more is asked for the time being."""


class Attendance(ABC):
    """The session of processes that train nothing, but work for those that do."""

    @abstractmethod
    def serve(self) -> None:
        """Works until those that train rest."""


def of_dataset(name: str, metrics: dict[str, float]) -> dict[str, float]:
    """An evaluation's metrics on the dataset `name` of `open_eval_datasets`, without "eval_"."""
    prefix = name.removeprefix("eval").removeprefix("_")
    return {f"{prefix}_{key}" if prefix else key: value for key, value in metrics.items()}
