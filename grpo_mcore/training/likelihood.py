"""How likely a model that is not trained finds given completions."""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist

from grpo_mcore import device
from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models.build import load_model
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.offload import offload
from grpo_mcore.training.pipeline import compute_log_probs
from grpo_mcore.training.split import Split


class FrozenModel:
    """A model with its weights on disk for good, spread over the ranks of `role`; every method is
    called by all of them, with the same arguments.

    Attributes:
        chunks: the model's parts on this rank, as a policy's.
    """

    @torch.no_grad()  # FP8 parameters then keep nothing for an optimizer
    def __init__(self, role: Role, shape: ModelShape, model: ModelConfig, config: TrainingConfig):
        self.role, self.shape, self.split = role, shape, Split(role, model, config)
        self.chunks = load_model(shape, model, role, config.seed).eval().requires_grad_(False)
        self.bring_back: Callable[[], None] | None = None
        """Where the model has left the device: what brings it back."""

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]:
        """log p(completion | prompt) at temperature 1 of each pair, in nats: the sum over the
        completion's tokens; 0 where it has none."""
        spare = -len(prompts) % self.split.row_multiple
        batch = pad_batch(
            [*prompts, *prompts[-1:] * spare],
            [*completions, *completions[-1:] * spare],
            self.split.length_multiple,
        )
        found, _ = compute_log_probs(self.chunks, self.split, batch, self.shape.vocab, 1.0)
        sums = found.where(batch["mask"].bool(), 0).double().sum(1)
        dist.all_reduce(sums, group=self.role.groups.pp)  # zeros but on the last stage
        return sums[: len(prompts)].tolist()

    def leave_device(self) -> None:
        """Moves the weights to host memory, where others want the device's."""
        if self.bring_back is None:
            self.bring_back = offload(chain(self.chunks.parameters(), self.chunks.buffers()))
            device.empty_cache()

    def return_to_device(self) -> None:
        """Undoes `leave_device`, if it was called."""
        if self.bring_back:
            self.bring_back()
            self.bring_back = None
