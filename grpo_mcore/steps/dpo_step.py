"""The steps of direct preference optimisation."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from grpo_mcore.data.preferences import Preference
from grpo_mcore.data.sources import Rows, Table
from grpo_mcore.objectives.dpo import dpo_loss, sequence_log_probs
from grpo_mcore.steps.offline_step import OfflineSession
from grpo_mcore.training.batch import Batch, pad_batch
from grpo_mcore.training.policy import BaseReference, Reference, release


class DPOSession(OfflineSession):
    """The reference's log-probabilities are computed once for each pair: of a table before
    training, again when a run is resumed, and of a stream batch by batch."""

    sequences = 2
    shown: ClassVar[dict[str, str]] = {
        "loss": "loss {:.4f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "rewards/margins": "margin {:+.3f}",
        "grad_norm": "grad norm {:.2f}",
        "eval_loss": "loss {:.4f}",
        "eval_rewards/accuracies": "accuracy {:.2f}",
    }

    def __init__(self, *parts, ref_path: str | None = None):
        """
        Args:
            parts: of OfflineSession.
            ref_path: the reference model's directory; None: the model's own.
        """
        super().__init__(*parts)
        self.ref_path = ref_path
        self.reference: Reference | BaseReference | None = self._load_reference()
        self.known: dict[Rows[Preference], Tensor] = {}
        """The reference's log-probabilities [pairs, 2] of tables' pairs, NaN where none is needed;
        on the last pipeline stage, zeros on others."""
        if isinstance(self.job.train, Table):
            steps = range(self.loop.done, self.config.max_steps)
            self._learn(self.job.train, {n for step in steps for n in self.order.rows(step)})
        for rows in self.job.evals.values():
            self._learn(rows, set(range(rows.size)))
        if isinstance(self.job.train, Table):
            self._release_reference()

    def make_batch(self, rows: Rows[Preference], numbers: list[int], counted: int) -> Batch:
        pairs = [rows[number] for number in numbers]
        batch = pad_batch(
            [pair.prompt for pair in pairs for _ in range(2)],
            [completion for pair in pairs for completion in (pair.chosen, pair.rejected)],
            self.policy.length_multiple,
        )
        batch["mask"][2 * counted :] = 0
        batch["weights"] = torch.zeros(2 * len(numbers))
        batch["weights"][: 2 * counted] = 1 / counted
        if rows in self.known:
            batch["reference"] = self.known[rows][numbers].flatten()
        else:
            log_probs = self.reference.log_probs(batch, 1.0)
            batch["reference"] = sequence_log_probs(log_probs, batch["mask"])
        return batch

    def loss(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sums, reference = sequence_log_probs(log_probs, part["mask"]), part["reference"]
        return dpo_loss(
            sums[::2],
            sums[1::2],
            reference[::2],
            reference[1::2],
            part["weights"][::2],
            self.config.beta,
            self.config.label_smoothing,
        )

    def evaluate(self, datasets: dict[str, Rows[Preference]] | None = None) -> dict[str, float]:
        if datasets is None or self.reference:
            return super().evaluate(datasets)
        self.reference = self._load_reference()
        metrics = super().evaluate(datasets)
        self._release_reference()
        return metrics

    def _learn(self, rows: Table[Preference], needed: set[int]) -> None:
        """Fills `known` for the rows `needed`. These are computed in blocks that depend on the
        dataset alone, so that a resumed run finds the same to the bit."""
        known = torch.full((rows.size, 2), torch.nan)
        for first in self.blocks(rows):
            block = known[first : first + self.config.batch_size]
            if not needed.isdisjoint(range(first, first + len(block))):
                found = self.block(rows, first)["reference"]
                block.copy_(found.view(-1, 2)[: len(block)])
        self.known[rows] = known

    def _load_reference(self) -> Reference | BaseReference:
        config = self.config
        if config.peft_config:
            return BaseReference(self.policy)
        model = replace(config.model, path=self.ref_path or config.model.path)
        return Reference(self.role, self.shape, model, self.per_sequence)

    def _release_reference(self) -> None:
        if isinstance(self.reference, Reference):
            release(self.reference.chunks)
        self.reference = None
