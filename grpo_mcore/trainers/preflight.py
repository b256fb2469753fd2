"""Everything that can be found wrong with a job before it joins a world or loads a model.

Every rank checks the same and comes to the same result, so no rank waits for one that stopped.
"""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from grpo_mcore.config import ConfigError, ModelConfig, TeacherGRPOConfig, TrainingConfig
from grpo_mcore.config.objective import check_objective
from grpo_mcore.data.questions import Question, load_questions
from grpo_mcore.data.text import fields_of
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.errors import FilesError
from grpo_mcore.models.expected import check_tensors
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.layers import DTYPES, RECOMPUTE
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import (
    LAYERS,
    RECIPES,
    check_fp8_sizes,
    check_layers,
    read_facts,
)
from grpo_mcore.objectives.correction import refuse_truncated_sampling
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.trainers.layouts import choose_layouts, count_engines
from grpo_mcore.trainers.lengths import Lengths, fit_lengths
from grpo_mcore.training.optimizer import SCHEDULES, check_optimizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Job:
    """A checked job: what a TeacherGRPOTrainer needs beside its configuration."""

    placement: str
    layouts: dict[str, Layout]
    shapes: dict[str, ModelShape]
    tokenizers: dict[str, Tokenizer]
    train: list[Question]
    eval: list[Question]
    dropped: int
    lengths: Lengths
    engines: dict[str, int]

    def describe(self) -> str:
        roles = ", ".join(
            f"{name} {layout} (TPxPPxDP) with {self.engines[name]} "
            f"engine{'s' if self.engines[name] > 1 else ''}"
            for name, layout in self.layouts.items()
        )
        return f"layout: {self.placement}: {roles}"


def check_job(config: TeacherGRPOConfig, world_size: int) -> Job:
    """Checks `config` for a job of `world_size` processes.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_settings(config)
    shapes = {
        role: read_shape(f"{role}.path", getattr(config, role).path)
        for role in ("teacher", "student")
    }
    check_fp8_sizes("teacher", config.teacher, shapes["teacher"])
    placement, layouts = choose_layouts(config, shapes, world_size)
    engines = {role: count_engines(config, role, layouts[role], shapes[role]) for role in layouts}
    train = load_questions(config.data, "data.train", config.data.train, config.data.train_split)
    held_out = []
    if config.data.eval:
        held_out = load_questions(
            config.data, "data.eval", config.data.eval, config.data.eval_split
        )
        held_out = held_out[: config.data.eval_size or None]
    for role in shapes:
        check_weights(f"{role}.path", getattr(config, role).path, shapes[role])
    tokenizers = {role: _load_tokenizer(role, getattr(config, role).path) for role in shapes}
    train, dropped, train_lengths = fit_lengths(config, "data.train", train, shapes, tokenizers)
    held_out, more, eval_lengths = fit_lengths(config, "data.eval", held_out, shapes, tokenizers)
    for source, kept in ((config.data.train, train), (config.data.eval, held_out)):
        if source and not kept:
            raise ConfigError(f"data.overlong=drop: every question of {source} is too long")
    return Job(
        placement, layouts, shapes, tokenizers, train, held_out, dropped + more,
        Lengths(*(max(pair) for pair in zip(train_lengths, eval_lengths, strict=True))), engines,
    )  # fmt: skip


def check_settings(config: TeacherGRPOConfig) -> None:
    """The checks that need no file, and so can precede even the making of models.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_training(config)
    _check_numbers(config)
    _check_templates(config)
    for role in ("teacher", "student"):
        check_model(role, getattr(config, role))
    check_optimizer(config, "teacher", config.teacher, read_facts())
    if config.student.fp8:
        raise ConfigError(f"student.fp8={config.student.fp8}: the student is not trained")


def _load_tokenizer(role: str, path: str) -> Tokenizer:
    # From config.json alone transformers makes a tokenizer without a vocabulary.
    if not any((Path(path) / name).exists() for name in TOKENIZER_FILES):
        raise ConfigError(f"{role}.path={path}: no tokenizer there ({', '.join(TOKENIZER_FILES)})")
    try:
        return Tokenizer(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{role}.path={path}: no tokenizer that loads: {reason}") from error


def check_training(config: TrainingConfig) -> None:
    """Checks the settings every trainer has."""
    _choice("lr_scheduler_type", config.lr_scheduler_type, SCHEDULES)
    for key in ("max_steps", "per_device_train_batch_size"):
        _at_least(key, getattr(config, key), 1)
    if config.max_tokens_per_micro_batch is not None:
        _at_least("max_tokens_per_micro_batch", config.max_tokens_per_micro_batch, 1)
    for key in ("warmup_steps", "stable_steps", "weight_decay"):
        _at_least(key, getattr(config, key), 0)
    if config.learning_rate <= 0:
        raise ConfigError(f"learning_rate={config.learning_rate}: must be above 0")
    if not 0 <= config.min_learning_rate <= config.learning_rate:
        raise ConfigError(
            f"min_learning_rate={config.min_learning_rate}: must be between 0 and "
            f"learning_rate={config.learning_rate}"
        )
    if config.lr_scheduler_type == "constant":
        for key in ("stable_steps", "min_learning_rate"):
            if getattr(config, key):
                raise ConfigError(
                    f"{key}={getattr(config, key)}: has no meaning with "
                    "lr_scheduler_type=constant; choose linear or cosine"
                )


def check_model(key: str, model: ModelConfig) -> None:
    """Checks one model's settings, but for its path."""
    _choice(f"{key}.dtype", model.dtype, DTYPES)
    _choice(f"{key}.layers", model.layers, LAYERS)
    if model.fp8 is not None:
        _choice(f"{key}.fp8", model.fp8, RECIPES)
    _choice(f"{key}.recompute", model.recompute, RECOMPUTE)
    for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
        _at_least(f"{key}.{name}", getattr(model, name), 0)
    for name in ("expert_parallel", "virtual_pipeline"):
        _at_least(f"{key}.{name}", getattr(model, name), 1)
    check_layers(key, model, read_facts())


def check_weights(key: str, path: str, shape: ModelShape) -> None:
    """Checks, by their headers, that the safetensors in directory `path`, the value of setting
    `key`, are whole and hold a model of `shape`."""
    try:
        check_tensors(HFReader(path), shape)
    except FilesError as error:  # which begins with the path
        raise ConfigError(f"{key}={error}") from error


def _check_numbers(config: TeacherGRPOConfig) -> None:
    check_objective(config)
    refuse_truncated_sampling(config, config.top_p, config.top_k, None)
    _choice("data.overlong", config.data.overlong, ("error", "drop"))
    _choice("layout.placement", config.layout.placement, ("auto", "separate", "colocated"))
    _at_least("num_generations", config.num_generations, 2)
    for key in (
        "num_prompts_per_step", "baseline_samples", "max_completion_length", "max_probe_tokens",
        "max_answer_tokens", "rollout.bucket_megabytes", "rollout.max_num_seqs",
    ):  # fmt: skip
        _at_least(key, attrgetter(key)(config), 1)
    for key in (
        "student_temperature", "top_k", "eval_steps", "save_steps",
        "log_completions", "data.eval_size",
    ):  # fmt: skip
        _at_least(key, attrgetter(key)(config), 0)
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p}: must be above 0 and at most 1")
    if config.save_total_limit is not None:
        _at_least("save_total_limit", config.save_total_limit, 1)
    if (config.metric_for_best_model or "").startswith("eval_") and config.data.eval is None:
        raise ConfigError(
            f"metric_for_best_model={config.metric_for_best_model}: needs data.eval, there is none"
        )
    for key in ("deadline_seconds", "kv_cache_gib", "gpu_memory_utilization"):
        if getattr(config.rollout, key) <= 0:
            raise ConfigError(f"rollout.{key}={getattr(config.rollout, key)}: must be above 0")
    if config.reward_timeout is not None and config.reward_timeout <= 0:
        raise ConfigError(f"reward_timeout={config.reward_timeout}: must be above 0")
    if config.temperature <= 0:
        raise ConfigError(
            f"temperature={config.temperature}: must be above 0, as GRPO compares samples"
        )
    if config.baseline_samples > 1 and config.student_temperature == 0:
        raise ConfigError(
            f"baseline_samples={config.baseline_samples}: greedy answers are all the same; "
            "use 1, or student_temperature above 0"
        )


def _check_templates(config: TeacherGRPOConfig) -> None:
    needed = {
        "baseline": {"question"},
        "diagnostic": {"question"},
        "adaptive": {"question", "approach"},
        "with_teaching": {"question", "teaching"},
    }
    for name, fields in needed.items():
        missing = fields - fields_of(getattr(config.templates, name))
        if missing:
            raise ConfigError(f"templates.{name}: lacks {{{sorted(missing)[0]}}}")


def _choice(key: str, value, known) -> None:
    if value not in known:
        choices = ", ".join(str(choice) for choice in known)
        raise ConfigError(f"{key}={value}: choose one of {choices}")


def _at_least(key: str, value, least) -> None:
    if value < least:
        raise ConfigError(f"{key}={value}: must be at least {least}")
