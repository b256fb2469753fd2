"""What every checked job tells its steps."""

from typing import Protocol

from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.shape import ModelShape


class Job(Protocol):
    """A job that has passed its checks.

    Attributes:
        shape, tokenizer: of the model that is trained.
        train_size: rows of the dataset; None: a stream.
        steps_per_epoch: None for a stream.
    """

    shape: ModelShape
    tokenizer: Tokenizer
    train_size: int | None
    steps_per_epoch: float | None

    def describe(self) -> str:
        """Lines for the user: who runs where."""
