"""What trainers share that learn from what the dataset has, without sampling."""

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from grpo_mcore.callbacks.runner import AnyCallback
from grpo_mcore.config import ConfigError, DPOConfig, SFTConfig
from grpo_mcore.data.order import Order
from grpo_mcore.data.sources import Rows, is_data_module, open_dataset, open_eval_datasets
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import World, world_size
from grpo_mcore.report.phases import Phases
from grpo_mcore.trainers.arguments import (
    check_kind,
    either,
    read_settings,
    with_adapters,
    with_model,
    with_optimizers,
)
from grpo_mcore.trainers.base import BaseTrainer, Session, of_dataset
from grpo_mcore.trainers.batches import steps_per_epoch, with_steps
from grpo_mcore.trainers.loop import Loop, Start
from grpo_mcore.trainers.preflight import open_model
from grpo_mcore.training.batch import Batch
from grpo_mcore.training.policy import Policy


class OfflineSession(Session):
    """Steps of which each takes the dataset's next rows, and evaluations that take all of them."""

    sequences: ClassVar[int] = 1
    """Made of each row of the dataset, side by side in a batch."""
    shown: ClassVar[dict[str, str]]
    """What the lines on the terminal show (`report.progress.Progress`)."""

    def __init__(self, trainer: "OfflineTrainer", world: World, start: Start):
        config = trainer.args
        self.trainer, self.config, self.shape = trainer, config, trainer.shape
        self.role = world.roles["policy"]
        # A micro-batch has whole rows of the dataset.
        self.per_sequence = replace(
            config, per_device_train_batch_size=config.per_device_train_batch_size * self.sequences
        )
        self.policy = Policy(
            self.role,
            self.shape,
            config.model,
            self.per_sequence,
            config.peft_config,
            trainer.lr_lambda,
        )
        self.order = Order(
            trainer.rows.size, config.batch_size, config.seed, config.shuffle_dataset
        )
        self.phases = Phases()
        self.loop = Loop(
            config,
            self.role,
            self.policy,
            start,
            self.shown,
            trainer.runner,
            steps_per_epoch=trainer.steps_per_epoch,
        )
        self.num_tokens: int = self.loop.restored.get("num_tokens", 0)
        self.loop.say(f"layout: {self.role.layout} (TPxPPxDP)")

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

    @property
    def evaluates(self) -> bool:
        return bool(self.trainer.evals)

    def train_step(self, step: int) -> dict[str, float]:
        with self.phases("step"):
            numbers = self.order.rows(step)
            batch = self.make_batch(self.trainer.rows, numbers, len(numbers))
            metrics = self.policy.compute_gradients(batch, self.loss)
            metrics |= self.policy.step()
        self.num_tokens += int(batch["lengths"].sum())
        return metrics | {"num_tokens": self.num_tokens} | self.phases.take()

    def evaluate(self, datasets: dict[str, Rows] | None = None) -> dict[str, float]:
        metrics = {}
        for name, rows in (datasets or self.trainer.evals).items():
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


class OfflineTrainer(BaseTrainer):
    """A trainer that learns from what the dataset has.

    The same script runs as one process under plain `python` and on every rank under torchrun.

    Attributes:
        rows: those of the dataset, encoded.
        evals: those of each evaluation dataset.
        layout, shape, tokenizer: of the model.
        steps_per_epoch: None for a stream.
    """

    session_class: ClassVar[type[OfflineSession]]

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
        if self._source() is not None:
            self._get_ready()

    @abstractmethod
    def _check(self, shape: ModelShape) -> None:
        """Raises ConfigError for a setting, or a model of `shape`, that cannot work."""

    @abstractmethod
    def _load(self, rows: Rows[dict], max_length: int) -> Rows:
        """The dataset's rows, encoded and cut to `max_length` tokens."""

    def _source(self) -> Any:
        return self.args.train if self.train_dataset is None else self.train_dataset

    def _set_data(self, dataset: Any) -> None:
        if dataset is not None:
            self.train_dataset = dataset

    def _prepare(self) -> None:
        config, source = self.args, self._source()
        if source is None:
            raise ConfigError("train_dataset=None: give a dataset, here, in args.train or to fit()")
        for key in ("max_length", "deadline_seconds"):
            if getattr(config, key) is not None and getattr(config, key) <= 0:
                raise ConfigError(f"{key}={getattr(config, key)}: must be above 0")
        config, self.layout, self.shape, self.tokenizer = open_model(
            config, world_size(), self.processing_class
        )
        self._check(self.shape)
        name = "train" if self.train_dataset is None else "train_dataset"
        seed = config.seed if config.shuffle_dataset else None
        self.rows = self._load(open_dataset(name, source, shuffle_seed=seed), self._max_length())
        self.steps_per_epoch = steps_per_epoch(config, self.layout.data, self.rows.size)
        self.args = with_steps(config, self.steps_per_epoch)
        evals = self.eval_dataset
        if evals is None and is_data_module(source):
            evals = source
        self.evals = self._open_evals(evals)
        if (config.metric_for_best_model or "").startswith("eval_") and not self.evals:
            raise ConfigError(
                f"metric_for_best_model={config.metric_for_best_model}: needs eval_dataset, there "
                "is none"
            )

    def _max_length(self) -> int:
        return min(self.args.max_length or self.shape.positions, self.shape.positions)

    def _open_evals(self, datasets: Any) -> dict[str, Rows]:
        opened = open_eval_datasets("eval_dataset", datasets)
        for rows in opened.values():
            if rows.size is None:
                raise ConfigError(f"{rows.name}: is a stream; evaluate on one of known length")
        return {name: self._load(rows, self._max_length()) for name, rows in opened.items()}

    def _world(self) -> tuple[dict[str, Layout], str, float]:
        return {"policy": self.layout}, "colocated", self.args.deadline_seconds

    def _open_session(self, world: World, cleanup: ExitStack) -> Session:
        return self.session_class(self, world, self._choose_start(world, "policy"))
