"""TensorBoard, Weights & Biases and MLflow, through transformers' own callbacks for them."""

import os
from collections.abc import Sequence

from transformers import TrainerCallback
from transformers.integrations import (
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    is_mlflow_available,
    is_tensorboard_available,
    is_wandb_available,
)

from grpo_mcore.errors import ConfigError

TRACKERS = {
    "tensorboard": (TensorBoardCallback, is_tensorboard_available),
    "wandb": (WandbCallback, is_wandb_available),
    "mlflow": (MLflowCallback, is_mlflow_available),
}
UPLOADS = {"wandb": ("WANDB_LOG_MODEL", "WANDB_WATCH"), "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS",)}
"""Variables that ask for more than numbers: transformers would upload a whole model, or a folder
named as its own checkpoints are, or watch gradients of a module that is whole."""


class _NumbersOnly:
    """Keeps the model from a tracker: it would read transformers' configuration in it."""

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, state, control)

    def on_log(self, args, state, control, logs=None, **_):
        super().on_log(args, state, control, logs=logs)


def tracker_callbacks(report_to: str | Sequence[str] | None) -> list[TrainerCallback]:
    """The callbacks of trackers. Each writes on rank 0 only, and is set as in transformers, by
    `run_name` and its variables (TENSORBOARD_LOGGING_DIR, WANDB_PROJECT, WANDB_MODE,
    MLFLOW_TRACKING_URI, ...).

    Args:
        report_to: "tensorboard", "wandb", "mlflow", several of them, "all" for those installed,
            or "none".

    Raises:
        ConfigError: for a name unknown or not installed, or a variable that cannot be honoured.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names == ["none"]:
        names = []
    elif names == ["all"]:
        names = [name for name, (_, is_available) in TRACKERS.items() if is_available()]
    return [_tracker(name) for name in names]


def _tracker(name: str) -> TrainerCallback:
    if name not in TRACKERS:
        raise ConfigError(f"report_to={name}: choose from {', '.join(TRACKERS)}, all, none")
    callback, is_available = TRACKERS[name]
    if not is_available():
        raise ConfigError(f"report_to={name}: is not available here; pip install {name}")
    for variable in UPLOADS.get(name, ()):
        value = os.environ.get(variable, "")
        if value.lower() not in ("", "0", "false"):
            raise ConfigError(f"{variable}={value}: report_to={name} sends numbers only; unset it")
    return type(callback.__name__, (_NumbersOnly, callback), {})()
