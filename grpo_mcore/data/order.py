"""Which rows a batch takes: a function of its number alone, so that a run's place in its data is
its step number, and a resumed run goes on exactly where the interrupted one was."""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

from grpo_mcore.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """Batches of `batch_size` rows of a dataset of `size` rows, epoch after epoch, each in an order
    of its own.

    A row of GRPO is a question; it is for the trainer to sample each one `num_generations` times.

    Attributes:
        size: None for a stream, which comes in an order of its own: batch n is its n-th rows.
        shuffle: False keeps the dataset's order in every epoch.
        drop_last: leave out rows at an epoch's end that fill no batch, as TRL's RepeatSampler;
            otherwise the next epoch's first rows join them.

    Raises:
        ConfigError: when `drop_last` leaves no batch.
    """

    size: int | None
    batch_size: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self):
        if self.size is not None and self._epoch_rows == 0:
            raise ConfigError(
                f"train_dataset: has {self.size} rows, fewer than the {self.batch_size} of one "
                "batch; give it more rows, or make the batch smaller"
            )

    @property
    def _epoch_rows(self) -> int:
        return self.size - self.size % self.batch_size if self.drop_last else self.size

    def rows(self, batch: int) -> list[int]:
        """The numbers of the rows of batch `batch` (from 0)."""
        positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        if self.size is None:
            return list(positions)
        places = (divmod(position, self._epoch_rows) for position in positions)
        if not self.shuffle:
            return [place for _, place in places]
        return [_shuffled(self.size, self.seed, epoch)[place] for epoch, place in places]

    def batches(self, epochs: float) -> int:
        """How many batches `epochs` epochs are, a last incomplete one counted whole.

        Raises:
            ConfigError: for a stream.
        """
        if self.size is None:
            raise ConfigError(
                "max_steps: must be set, as train_dataset is a stream, which has no known length"
            )
        return math.ceil(epochs * self._epoch_rows / self.batch_size)


@dataclass(frozen=True)
class GenerationCycle:
    """How GRPO's optimizer steps use generations, as TRL counts them: a generation's completions
    are split in `steps_per_generation` parts, each a micro-step's; all parts are gone through
    `num_iterations` times; and an optimizer step has `gradient_accumulation_steps` micro-steps.
    """

    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int = 1

    @property
    def micro_steps(self) -> int:
        """Micro-steps between one generation and the next."""
        return self.steps_per_generation * self.num_iterations

    def parts(self, step: int) -> list[tuple[int, int]]:
        """(generation, part of it) of each micro-step of optimizer step `step`, all from 0."""
        first = step * self.gradient_accumulation_steps
        return [
            (micro // self.micro_steps, micro % self.steps_per_generation)
            for micro in range(first, first + self.gradient_accumulation_steps)
        ]

    def first_step(self, generation: int) -> int:
        """The optimizer step that uses generation `generation` first."""
        return generation * self.micro_steps // self.gradient_accumulation_steps

    def steps(self, epochs: float, generations: int) -> int:
        """Optimizer steps in `epochs` epochs of `generations` generations each, as transformers'
        Trainer counts them. (Where an epoch's micro-steps do not divide by the accumulation, its
        last step there is a short one; here it goes on into the next epoch.)"""
        micro_steps = generations * self.micro_steps
        return math.ceil(epochs * math.ceil(micro_steps / self.gradient_accumulation_steps))


@lru_cache(maxsize=4)  # epochs that meet in a batch, of a few datasets
def _shuffled(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
