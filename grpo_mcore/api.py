"""Trainers by name, and training in one call (NeMo RL, "Functional API Helpers")."""

from typing import TYPE_CHECKING, Any

import grpo_mcore
from grpo_mcore.errors import ConfigError

if TYPE_CHECKING:
    from grpo_mcore.report.result import TrainingResult
    from grpo_mcore.trainers.base import BaseTrainer

TRAINERS = {
    "dpo": "DPOTrainer",
    "grpo": "GRPOTrainer",
    "sft": "SFTTrainer",
    "teacher_grpo": "TeacherGRPOTrainer",
}


def list_algorithms() -> list[str]:
    """The names that `get_algorithm` and `create_trainer` take."""
    return sorted(TRAINERS)


def get_algorithm(name: str) -> "type[BaseTrainer]":
    """The class of a trainer.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in TRAINERS:
        raise ConfigError(f"algorithm={name}: choose one of {', '.join(list_algorithms())}")
    return getattr(grpo_mcore, TRAINERS[name])


def create_trainer(name: str, model: Any = None, **settings) -> "BaseTrainer":
    """A trainer of `get_algorithm(name)`.

    Args:
        model: a path, a hub id or a transformers model.
        settings: those of the trainer's `from_pretrained`; or, where `args` (or `config`) is among
            them, arguments of its constructor.

    Raises:
        ConfigError: for an unknown name, or a setting that is unknown or cannot work.
    """
    trainer = get_algorithm(name)
    if settings.keys() & {"args", "config"}:
        return trainer(model, **settings)
    return trainer.from_pretrained(model, **settings)


def train(
    algorithm: str, model: Any, dataset: Any, reward_fn: Any = None, **settings
) -> "TrainingResult":
    """Makes a trainer, trains on `dataset`, and tells how it went.

    Args:
        reward_fn: of what GRPO samples: a function, a model, or several.
        settings: as of `create_trainer`.

    Raises:
        ConfigError: as `create_trainer`.
    """
    if reward_fn is not None:
        settings["reward_fn"] = reward_fn
    return create_trainer(algorithm, model, train_dataset=dataset, **settings).fit()
