"""What trainers share that learn from what the dataset has, without sampling."""

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, ClassVar

from grpo_mcore.callbacks.runner import AnyCallback
from grpo_mcore.config import DPOConfig, SFTConfig
from grpo_mcore.data.sources import Rows
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import World, world_size
from grpo_mcore.preflight.offline_job import Load, check_offline
from grpo_mcore.steps.offline_step import OfflineSession
from grpo_mcore.steps.session import Session
from grpo_mcore.trainers.arguments import (
    check_kind,
    either,
    read_settings,
    with_adapters,
    with_model,
    with_optimizers,
)
from grpo_mcore.trainers.base import BaseTrainer


class OfflineTrainer(BaseTrainer):
    """A trainer that learns from what the dataset has.

    The same script runs as one process under plain `python` and on every rank under torchrun.

    Attributes:
        job: what was found of model and data; set once these are known.
    """

    load: ClassVar[Load]
    """Encodes a dataset's rows."""

    def __init__(
        self,
        model: Any = None,
        args: SFTConfig | DPOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[AnyCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        config: SFTConfig | DPOConfig | None = None,
        tokenizer: Any = None,
    ):
        """Checks everything that can be checked before models load.

        Args:
            model: a path, a hub id or a transformers model; NeMo RL's whole configuration, a
                dictionary; or what `args` would be.
            train_dataset: rows, in one of the forms of `data.sources`; None: `args.train`, or `fit`
                brings it.
            eval_dataset: the same, or a dictionary of such.
            processing_class: a transformers tokenizer; None: the model's own.
            callbacks: NeMo RL's or transformers'.
            optimizers: (torch.optim.AdamW, LambdaLR), of which the settings count.
            peft_config: a peft.LoraConfig: train adapters only.
            config, tokenizer: other libraries' names for `args` and `processing_class`.

        Raises:
            ConfigError: for a setting that cannot work.
            TypeError: for an argument given under two names.
        """
        args = either("args", args, "config", config)
        model, args = read_settings(model, args, self.config_class, self.algorithm)
        check_kind(args, self.config_class)
        tokenizer = either("processing_class", processing_class, "tokenizer", tokenizer)
        args = with_adapters(with_model(args, model, tokenizer), peft_config)
        args, self.lr_lambda = with_optimizers(args, optimizers)
        super().__init__(args, callbacks, tokenizer)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if train_dataset is not None or args.train is not None:
            self._get_ready()

    @abstractmethod
    def _steps(self, *parts) -> OfflineSession:
        """Its steps, of the `parts` that OfflineSession is made of."""

    def _set_data(self, dataset: Any) -> None:
        if dataset is not None:
            self.train_dataset = dataset

    def _prepare(self) -> None:
        self.args, self.job = check_offline(
            self.args,
            world_size(),
            self.train_dataset,
            self.eval_dataset,
            self.processing_class,
            self.load,
        )

    def _open_evals(self, datasets: Any) -> dict[str, Rows]:
        return self.job.open_evals(datasets)

    def _world(self) -> tuple[dict[str, Layout], str, float]:
        return {"policy": self.job.layout}, "colocated", self.args.deadline_seconds

    def _open_session(self, world: World, cleanup: ExitStack) -> Session:
        start = self._choose_start(world, "policy")
        role = world.roles["policy"]
        return self._steps(self.args, self.job, role, start, self.runner, self.lr_lambda)
