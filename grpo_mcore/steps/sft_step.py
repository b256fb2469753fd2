"""The steps of supervised fine-tuning."""

from typing import ClassVar

from torch import Tensor

from grpo_mcore.data.packing import number_documents
from grpo_mcore.data.sources import Rows
from grpo_mcore.data.supervised import Example
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.objectives.sft import sft_loss
from grpo_mcore.steps.offline_step import OfflineSession
from grpo_mcore.training.batch import Batch, align, pad_batch


class SFTSession(OfflineSession):
    """The loss of an update is the mean over its target tokens."""

    shown: ClassVar[dict[str, str]] = {
        "loss": "loss {:.4f}",
        "grad_norm": "grad norm {:.2f}",
        "eval_loss": "loss {:.4f}",
    }

    def make_batch(self, rows: Rows[Example], numbers: list[int], counted: int) -> Batch:
        examples = [rows[number] for number in numbers]
        batch = pad_batch(
            [example.tokens[:1] for example in examples],
            [example.tokens[1:] for example in examples],
            self.policy.length_multiple,
        )
        batch["mask"] = align([example.targets[1:] for example in examples], batch["mask"])
        batch["mask"][counted:] = 0
        batch["weights"] = batch["mask"] / batch["mask"].sum().clamp(min=1)
        if self.config.packing:
            documents = [example.documents for example in examples]
            batch["documents"] = number_documents(documents, batch["tokens"].shape[1])
        return batch

    def loss(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sft_loss(log_probs, part["weights"])
        return loss, {"loss": loss}

    def measures(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return log_probs.sum(), {"loss": mean_of(-log_probs, part["mask"])}
