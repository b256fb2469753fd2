"""What training returns: transformers' TrainOutput from `train()`, TrainingResult from `fit()`."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

__all__ = ["TrainOutput", "TrainingResult", "training_result"]


@dataclass
class TrainingResult:
    """What NeMo RL's `fit()` returns."""

    metrics: dict[str, Any]
    best_checkpoint_path: str | None
    """None where no checkpoint was the best by `metric_for_best_model`."""
    total_steps: int
    total_epochs: int
    """Epochs completed."""


def training_result(output: TrainOutput, state: TrainerState) -> TrainingResult:
    """The result of a run that gave `output`. Its metrics are the last logged value of each
    metric, and those of `output`; `loss`, if never logged, is the mean training loss."""
    metrics = {"loss": output.training_loss}
    for record in (*state.log_history, output.metrics):
        metrics |= record
    return TrainingResult(
        {name: metrics[name] for name in metrics if name not in ("step", "epoch")},
        state.best_model_checkpoint,
        output.global_step,
        int(state.epoch),
    )
