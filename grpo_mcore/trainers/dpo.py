"""Direct preference optimisation on pairs of a chosen and a rejected completion."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from grpo_mcore.config import ConfigError, DPOConfig
from grpo_mcore.data.preferences import Preference, load_preferences
from grpo_mcore.data.sources import Rows, Table
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.sources import local_model
from grpo_mcore.objectives.dpo import dpo_loss, sequence_log_probs
from grpo_mcore.parallel.world import World
from grpo_mcore.trainers.loop import Start
from grpo_mcore.trainers.offline import OfflineSession, OfflineTrainer
from grpo_mcore.trainers.preflight import check_reference
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

    def __init__(self, trainer: "DPOTrainer", world: World, start: Start):
        super().__init__(trainer, world, start)
        self.reference: Reference | BaseReference | None = self._load_reference()
        self.known: dict[Rows[Preference], Tensor] = {}
        """The reference's log-probabilities [pairs, 2] of tables' pairs, NaN where none is needed;
        on the last pipeline stage, zeros on others."""
        if isinstance(trainer.rows, Table):
            steps = range(self.loop.done, self.config.max_steps)
            self._learn(trainer.rows, {n for step in steps for n in self.order.rows(step)})
        for rows in trainer.evals.values():
            self._learn(rows, set(range(rows.size)))
        if isinstance(trainer.rows, Table):
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
        model = replace(config.model, path=self.trainer.ref_path or config.model.path)
        return Reference(self.role, self.shape, model, self.per_sequence)

    def _release_reference(self) -> None:
        if isinstance(self.reference, Reference):
            release(self.reference.chunks)
        self.reference = None


class DPOTrainer(OfflineTrainer):
    """Trains on rows of `chosen` and `rejected`, with a `prompt` or with what both begin with."""

    algorithm = "dpo"
    config_class = DPOConfig
    session_class = DPOSession

    def __init__(
        self, model: Any = None, ref_model: Any = None, args: DPOConfig | None = None, **others
    ):
        """
        Args:
            model, args, others: as of OfflineTrainer.
            ref_model: the reference model, of the same shape: a path, a hub id or a transformers
                model. None: the model as it is at first; with `peft_config`, without adapters.

        Raises:
            ConfigError: for a setting that cannot work.
            TypeError: for an argument given under two names.
        """
        self.ref_model, self.ref_path = ref_model, None
        super().__init__(model, args, **others)

    def _check(self, shape: ModelShape) -> None:
        config = self.args
        if config.beta <= 0:
            raise ConfigError(f"beta={config.beta}: must be above 0")
        if not 0 <= config.label_smoothing < 0.5:
            raise ConfigError(
                f"label_smoothing={config.label_smoothing}: must be at least 0 and below 0.5"
            )
        if config.max_tokens_per_micro_batch is not None:
            raise ConfigError(
                f"max_tokens_per_micro_batch={config.max_tokens_per_micro_batch}: would tear pairs "
                "apart; set per_device_train_batch_size, which counts pairs"
            )
        if self.ref_model is None:
            return
        if config.peft_config:
            raise ConfigError(
                "ref_model: with peft_config the reference is the model without adapters; leave "
                "one of them out"
            )
        directory = Path(config.output_dir) / "models"
        self.ref_path = local_model("ref_model", self.ref_model, directory)
        check_reference(self.ref_path, shape)

    def _load(self, rows: Rows[dict], max_length: int) -> Rows[Preference]:
        return load_preferences(rows, self.tokenizer.inner, max_length)
