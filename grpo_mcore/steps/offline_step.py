"""The steps of trainers that learn from what the dataset has, without sampling."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.checkpoint.start import Start
from grpo_mcore.data.order import Order
from grpo_mcore.data.sources import Rows
from grpo_mcore.parallel.groups import Role
from grpo_mcore.preflight.offline_job import OfflineConfig, OfflineJob
from grpo_mcore.report.phases import Phases
from grpo_mcore.steps.loop import Loop
from grpo_mcore.steps.session import Session, of_dataset
from grpo_mcore.training.batch import Batch
from grpo_mcore.training.policy import Policy


class OfflineSession(Session):
    """Steps of which each takes the dataset's next rows, and evaluations that take all of them."""

    sequences: ClassVar[int] = 1
    """Made of each row of the dataset, side by side in a batch."""
    shown: ClassVar[dict[str, str]]
    """What the lines on the terminal show (`report.progress.Progress`)."""

    def __init__(
        self,
        config: OfflineConfig,
        job: OfflineJob,
        role: Role,
        start: Start,
        runner: CallbackRunner,
        lr_lambda: Callable[[int], float] | None = None,
    ):
        """Loads the model, or the checkpoint of `start`.

        Args:
            lr_lambda: from steps made to a factor of the learning rate, in place of the schedule.
        """
        self.config, self.job, self.role, self.shape = config, job, role, job.shape
        # A micro-batch has whole rows of the dataset.
        self.per_sequence = replace(
            config, per_device_train_batch_size=config.per_device_train_batch_size * self.sequences
        )
        self.policy = Policy(
            role, job.shape, config.model, self.per_sequence, config.peft_config, lr_lambda
        )
        self.order = Order(job.train_size, config.batch_size, config.seed, config.shuffle_dataset)
        self.phases, self.evaluates = Phases(), bool(job.evals)
        self.loop = Loop(
            config,
            self.policy,
            start,
            self.shown,
            runner,
            steps_per_epoch=job.steps_per_epoch,
        )
        self.num_tokens: int = self.loop.restored.get("num_tokens", 0)
        self.loop.say(job.describe())

    @abstractmethod
    def make_batch(self, rows: Rows, numbers: list[int], counted: int) -> Batch:
        """The rows `numbers` as tensors.

        Args:
            counted: how many of them count, the first.
        """

    @abstractmethod
    def loss(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss, and its metrics (`training.policy.Loss`)."""

    def measures(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of an evaluation, whose metrics are means over all of its batches."""
        return self.loss(log_probs, entropy, part)

    def train_step(self, step: int) -> dict[str, float]:
        with self.phases("step"):
            numbers = self.order.rows(step)
            batch = self.make_batch(self.job.train, numbers, len(numbers))
            metrics = self.policy.compute_gradients(batch, self.loss)
            metrics |= self.policy.step()
        self.num_tokens += int(batch["lengths"].sum())
        return metrics | {"num_tokens": self.num_tokens} | self.phases.take()

    def evaluate(self, datasets: dict[str, Rows] | None = None) -> dict[str, float]:
        metrics = {}
        for name, rows in (datasets or self.job.evals).items():
            batches = (self.block(rows, first) for first in self.blocks(rows))
            metrics |= of_dataset(name, self.policy.measure(batches, self.measures))
        return metrics

    def blocks(self, rows: Rows) -> range:
        """The first row of each block of `batch_size` rows of a dataset."""
        return range(0, rows.size, self.config.batch_size)

    def block(self, rows: Rows, first: int) -> Batch:
        """A block; ranks' shares of the last one are filled up with rows that do not count."""
        config, ranks = self.config, self.role.layout.data
        numbers = list(range(first, min(first + config.batch_size, rows.size)))
        share = config.per_device_train_batch_size * self.policy.split.count_multiple
        filling = numbers[-1:] * (-len(numbers) % (share * ranks))
        return self.make_batch(rows, numbers + filling, len(numbers))

    def state(self) -> dict:
        return {"num_tokens": self.num_tokens}
