"""Supervised fine-tuning on texts, conversations, or prompts and their completions."""

from grpo_mcore.config import SFTConfig
from grpo_mcore.preflight.offline_job import load_supervised
from grpo_mcore.steps.sft_step import SFTSession
from grpo_mcore.trainers.offline import OfflineTrainer


class SFTTrainer(OfflineTrainer):
    """Trains on rows of `prompt` and `completion`, of `messages`, or of `text`.

    `SFTTrainer(SFTConfig(model=ModelConfig(path=...), train="rows.jsonl")).train()` is enough.
    `loss` is the mean over the targets of an update, `eval_loss` over those of the dataset.
    """

    algorithm = "sft"
    config_class = SFTConfig
    load = staticmethod(load_supervised)

    def _steps(self, *parts) -> SFTSession:
        return SFTSession(*parts)
