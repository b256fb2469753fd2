"""What the batch sizes and lengths of a configuration that are left open must be."""

import math
from dataclasses import replace
from typing import TypeVar

from grpo_mcore.config import ConfigError, GroupConfig, TrainingConfig
from grpo_mcore.data.order import GenerationCycle

Config = TypeVar("Config", bound=TrainingConfig)


def with_batches(config: Config, data_ranks: int) -> Config:
    """`config` with gradient_accumulation_steps, and batch_size or steps_per_generation, as
    numbers.

    Raises:
        ConfigError: where they contradict one another.
    """
    rows = config.per_device_train_batch_size * data_ranks
    made_of = (
        f"per_device_train_batch_size={config.per_device_train_batch_size} x {data_ranks} data "
        "parallel ranks"
    )
    if isinstance(config, GroupConfig):
        return _with_groups(config, rows, made_of)
    accumulation = config.gradient_accumulation_steps
    size = config.batch_size or rows * (accumulation or 1)
    accumulation = _accumulation(f"batch_size={size}", size, rows, accumulation, made_of)
    return replace(config, batch_size=size, gradient_accumulation_steps=accumulation)


def _with_groups(config: GroupConfig, rows: int, made_of: str) -> GroupConfig:
    group, accumulation = config.num_generations, config.gradient_accumulation_steps
    prompts, parts = config.num_prompts_per_step, config.steps_per_generation
    if config.generation_batch_size is not None:
        key = f"generation_batch_size={config.generation_batch_size}"
        if parts is not None:
            raise ConfigError(f"{key}: steps_per_generation={parts} says it already; give one")
        if config.generation_batch_size % rows:
            raise ConfigError(f"{key}: does not divide by {rows} ({made_of})")
        parts = config.generation_batch_size // rows
    if prompts is not None:
        key = f"num_prompts_per_step={prompts} x num_generations={group}"
        accumulation = _accumulation(key, prompts * group, rows, accumulation, made_of)
    elif accumulation is None:
        accumulation = 1 if parts else math.lcm(rows, group) // rows
    parts = accumulation if parts is None else parts
    if rows * parts % group:
        raise ConfigError(
            f"num_generations={group}: does not divide a generation's {rows * parts} completions "
            f"({made_of} x {parts} steps_per_generation)"
        )
    return replace(
        config,
        num_prompts_per_step=prompts,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=parts,
        generation_batch_size=None,
    )


def _accumulation(key: str, size: int, rows: int, given: int | None, made_of: str) -> int:
    if size % rows:
        raise ConfigError(f"{key}: {size} sequences do not divide by {rows} ({made_of})")
    if given not in (None, size // rows):
        raise ConfigError(
            f"gradient_accumulation_steps={given}: {key} are {size} sequences, which {made_of} "
            f"make in {size // rows}; leave one of them out"
        )
    return size // rows


def prompts_per_generation(config: GroupConfig, data_ranks: int) -> int:
    """Of a configuration `with_batches`."""
    rows = config.per_device_train_batch_size * data_ranks
    return rows * config.steps_per_generation // config.num_generations


def generation_cycle(config: GroupConfig) -> GenerationCycle:
    """Of a configuration `with_batches`."""
    return GenerationCycle(
        config.gradient_accumulation_steps, config.steps_per_generation, config.num_iterations
    )


def steps_per_epoch(config: TrainingConfig, data_ranks: int, rows: int | None) -> float | None:
    """Optimizer steps that an epoch of `rows` rows makes, with a configuration `with_batches`; None
    where their number is not known."""
    if rows is None:
        return None
    if not isinstance(config, GroupConfig):
        return rows / config.batch_size
    cycle = generation_cycle(config)
    generations = rows / prompts_per_generation(config, data_ranks)
    return generations * cycle.micro_steps / cycle.gradient_accumulation_steps


def with_steps(config: Config, per_epoch: float | None) -> Config:
    """`config` with `max_steps` and `warmup_steps` as numbers of steps, and `greater_is_better`.

    Raises:
        ConfigError: where only the data's end would tell how many there are.
    """
    steps = config.max_steps
    if steps == -1:
        if per_epoch is None:
            raise ConfigError(
                "max_steps=-1: must be set, as train_dataset is a stream, which has no known length"
            )
        steps = max(1, math.ceil(config.num_train_epochs * per_epoch))
    warmup = config.warmup_steps
    return replace(
        config,
        max_steps=steps,
        warmup_steps=round(warmup * steps) if warmup < 1 else warmup,
        greater_is_better=is_greater_better(config),
    )


def is_greater_better(config: TrainingConfig) -> bool:
    """Whether the best model is that of the greatest `metric_for_best_model`."""
    if config.greater_is_better is not None:
        return config.greater_is_better
    return not (config.metric_for_best_model or "").endswith("loss")
