"""Direct preference optimisation on pairs of a chosen and a rejected completion."""

from pathlib import Path
from typing import Any

from grpo_mcore.config import ConfigError, DPOConfig
from grpo_mcore.models.sources import local_model
from grpo_mcore.preflight.models import check_reference
from grpo_mcore.preflight.offline_job import load_pairs
from grpo_mcore.steps.dpo_step import DPOSession
from grpo_mcore.trainers.offline import OfflineTrainer


class DPOTrainer(OfflineTrainer):
    """Trains on rows of `chosen` and `rejected`, with a `prompt` or with what both begin with."""

    algorithm = "dpo"
    config_class = DPOConfig
    load = staticmethod(load_pairs)

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

    def _prepare(self) -> None:
        super()._prepare()
        if self.ref_model is None:
            return
        if self.args.peft_config:
            raise ConfigError(
                "ref_model: with peft_config the reference is the model without adapters; leave "
                "one of them out"
            )
        directory = Path(self.args.output_dir) / "models"
        self.ref_path = local_model("ref_model", self.ref_model, directory)
        check_reference(self.ref_path, self.job.shape)

    def _steps(self, *parts) -> DPOSession:
        return DPOSession(*parts, ref_path=self.ref_path)
