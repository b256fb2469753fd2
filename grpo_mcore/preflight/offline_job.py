"""Everything that can be found wrong with a job of SFTTrainer or DPOTrainer before models load."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_mcore.config import ConfigError, DPOConfig, ModelConfig, SFTConfig
from grpo_mcore.data.preferences import Preference, load_preferences
from grpo_mcore.data.sources import Rows, is_data_module, open_dataset, open_eval_datasets
from grpo_mcore.data.supervised import Example, load_examples
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import read_facts, uses_transformer_engine
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import steps_per_epoch, with_steps
from grpo_mcore.preflight.models import open_model

OfflineConfig = SFTConfig | DPOConfig
Load = Callable[[OfflineConfig, Tokenizer, Rows[dict], int], Rows]
"""(configuration, tokenizer, a dataset's rows, tokens at most) -> the rows encoded."""


@dataclass(frozen=True)
class OfflineJob:
    """A checked job: what steps that take their dataset's rows need beside the configuration.

    Attributes:
        train: rows of the dataset, encoded.
        evals: those of each evaluation dataset.
        open_evals: the same of further datasets.
        steps_per_epoch: None for a stream.
    """

    layout: Layout
    shape: ModelShape
    tokenizer: Tokenizer
    train: Rows
    evals: dict[str, Rows]
    open_evals: Callable[[Any], dict[str, Rows]]
    steps_per_epoch: float | None

    @property
    def train_size(self) -> int | None:
        return self.train.size

    def describe(self) -> str:
        return f"layout: {self.layout} (TPxPPxDP)"


def check_offline(
    config: OfflineConfig,
    world_size: int,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: Any,
    load: Load,
) -> tuple[OfflineConfig, OfflineJob]:
    """Checks a job of `world_size` processes.

    Args:
        train_dataset: None: `config.train`.

    Returns:
        The configuration with numbers for all that it left open, and the job.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    key, source = "train_dataset", train_dataset
    if source is None:
        key, source = "train", config.train
    if source is None:
        raise ConfigError("train_dataset=None: give a dataset, here, in args.train or to fit()")
    config, layout, shape, own_tokenizer = open_model(config, world_size, tokenizer)
    _check_kind(config, shape)
    longest = min(config.max_length or shape.positions, shape.positions)

    def open_evals(datasets: Any) -> dict[str, Rows]:
        opened = open_eval_datasets("eval_dataset", datasets)
        for rows in opened.values():
            if rows.size is None:
                raise ConfigError(f"{rows.name}: is a stream; evaluate on one of known length")
        return {n: load(config, own_tokenizer, rows, longest) for n, rows in opened.items()}

    seed = config.seed if config.shuffle_dataset else None
    train = load(config, own_tokenizer, open_dataset(key, source, shuffle_seed=seed), longest)
    per_epoch = steps_per_epoch(config, layout.data, train.size)
    config = with_steps(config, per_epoch)
    if eval_dataset is None and is_data_module(source):
        eval_dataset = source
    evals = open_evals(eval_dataset)
    if (config.metric_for_best_model or "").startswith("eval_") and not evals:
        raise ConfigError(
            f"metric_for_best_model={config.metric_for_best_model}: needs eval_dataset, there is "
            "none"
        )
    job = OfflineJob(layout, shape, own_tokenizer, train, evals, open_evals, per_epoch)
    return config, job


def load_supervised(
    config: SFTConfig, tokenizer: Tokenizer, rows: Rows[dict], max_length: int
) -> Rows[Example]:
    return load_examples(
        rows,
        tokenizer.inner,
        max_length,
        config.completion_only_loss,
        config.assistant_only_loss,
        config.packing,
        config.dataset_text_field,
    )


def load_pairs(
    config: DPOConfig, tokenizer: Tokenizer, rows: Rows[dict], max_length: int
) -> Rows[Preference]:
    return load_preferences(rows, tokenizer.inner, max_length)


def check_packing(key: str, shape: ModelShape, model: ModelConfig) -> None:
    """Checks that several documents in a row can be kept apart in `model`, section `key`.

    Raises:
        ConfigError: where they cannot.
    """
    if shape.window:
        raise ConfigError(
            f"packing=true: {key}.path={model.path} has layers with a sliding window, which cannot "
            "keep documents apart; leave it false"
        )
    if uses_transformer_engine(model, read_facts()) and model.dtype != "bfloat16":
        raise ConfigError(
            f"packing=true: Transformer Engine keeps documents apart in bfloat16 only; needs "
            f"{key}.dtype=bfloat16, not {model.dtype}, or {key}.layers=local"
        )


def _check_kind(config: OfflineConfig, shape: ModelShape) -> None:
    if isinstance(config, SFTConfig):
        if config.packing:
            check_packing("model", shape, config.model)
        return
    if config.max_tokens_per_micro_batch is not None:
        raise ConfigError(
            f"max_tokens_per_micro_batch={config.max_tokens_per_micro_batch}: would tear pairs "
            "apart; set per_device_train_batch_size, which counts pairs"
        )
