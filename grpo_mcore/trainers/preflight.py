"""Everything that can be found wrong with a job before it joins a world or loads a model.

Every rank checks the same and comes to the same result, so no rank waits for one that stopped.
"""

from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, ModelConfig, TeacherGRPOConfig, TrainingConfig
from grpo_mcore.data.questions import Question, load_questions
from grpo_mcore.data.text import fields_of, fill
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.build import DTYPES
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import INDEX, SINGLE
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.objectives.advantages import SCALES
from grpo_mcore.objectives.grpo import LOSS_TYPES
from grpo_mcore.parallel.auto_layout import fit_roles
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.training.optimizer import SCHEDULES

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Lengths:
    """Longest sequence, prompt and completion, that an engine can meet."""

    teacher: int
    student: int


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
    placement, layouts = _choose_layouts(config, shapes, world_size)
    engines = {role: _engines(config, role, layouts[role], shapes[role]) for role in layouts}
    train = load_questions(config.data, "data.train", config.data.train, config.data.train_split)
    held_out = []
    if config.data.eval:
        held_out = load_questions(
            config.data, "data.eval", config.data.eval, config.data.eval_split
        )
        held_out = held_out[: config.data.eval_size or None]
    for role in shapes:
        check_weights(f"{role}.path", getattr(config, role).path)
    tokenizers = {role: _load_tokenizer(role, getattr(config, role).path) for role in shapes}
    train, dropped, train_lengths = _fit_lengths(config, "data.train", train, shapes, tokenizers)
    held_out, more, eval_lengths = _fit_lengths(config, "data.eval", held_out, shapes, tokenizers)
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
    if model.fp8 is not None:
        _choice(f"{key}.fp8", model.fp8, FP8_RECIPES)
        if not device.is_cuda():
            raise ConfigError(f"{key}.fp8={model.fp8}: FP8 needs an NVIDIA GPU, none is here")


def check_weights(key: str, path: str) -> None:
    """Checks that directory `path`, the value of setting `key`, holds safetensors."""
    if not any((Path(path) / name).exists() for name in (SINGLE, INDEX)):
        raise ConfigError(f"{key}={path}: no weights there ({SINGLE} or {INDEX})")


def why_not(layout: Layout, shape: ModelShape) -> str | None:
    """Why a model of `shape` cannot be split by `layout`; None where it can."""
    if shape.heads % layout.tensor:
        return f"{shape.heads} attention heads do not divide by tensor parallel {layout.tensor}"
    if shape.groups % layout.tensor:
        return f"{shape.groups} key-value heads do not divide by tensor parallel {layout.tensor}"
    if shape.ffn % layout.tensor:
        return f"feed-forward size {shape.ffn} does not divide by tensor parallel {layout.tensor}"
    if shape.layers < layout.pipeline:
        return f"{shape.layers} layers are fewer than {layout.pipeline} pipeline stages"
    if shape.layers % layout.pipeline:
        return f"{shape.layers} layers do not divide by {layout.pipeline} pipeline stages"
    return None


def batch_misfit(sequences: int, micro_batch: int, layout: Layout) -> str | None:
    """Why `sequences` cannot be dealt to the layout's data parallel ranks in micro-batches."""
    if sequences % layout.data:
        return f"the batch of {sequences} sequences does not divide by data parallel {layout.data}"
    if (sequences // layout.data) % micro_batch:
        return (
            f"a data parallel rank's {sequences // layout.data} sequences do not divide by "
            f"per_device_train_batch_size={micro_batch}"
        )
    return None


def _check_numbers(config: TeacherGRPOConfig) -> None:
    _choice("loss_type", config.loss_type, LOSS_TYPES)
    _choice("scale_rewards", config.scale_rewards, SCALES)
    _choice("data.overlong", config.data.overlong, ("error", "drop"))
    _choice("layout.placement", config.layout.placement, ("auto", "separate", "colocated"))
    _at_least("num_generations", config.num_generations, 2)
    for key in (
        "num_prompts_per_step", "baseline_samples", "max_completion_length", "max_probe_tokens",
        "max_answer_tokens", "rollout.bucket_megabytes", "rollout.max_num_seqs",
    ):  # fmt: skip
        _at_least(key, attrgetter(key)(config), 1)
    for key in (
        "beta", "epsilon", "student_temperature", "top_k", "eval_steps", "save_steps",
        "log_completions", "data.eval_size",
    ):  # fmt: skip
        _at_least(key, attrgetter(key)(config), 0)
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p={config.top_p}: must be above 0 and at most 1")
    for key in ("deadline_seconds", "kv_cache_gib", "gpu_memory_utilization"):
        if getattr(config.rollout, key) <= 0:
            raise ConfigError(f"rollout.{key}={getattr(config.rollout, key)}: must be above 0")
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


def _choose_layouts(
    config: TeacherGRPOConfig, shapes: dict[str, ModelShape], world_size: int
) -> tuple[str, dict[str, Layout]]:
    sequences = config.num_prompts_per_step * config.num_generations
    asked = {
        role: None if text == "auto" else Layout.parse(f"layout.{role}", text)
        for role, text in (("teacher", config.layout.teacher), ("student", config.layout.student))
    }
    for role, layout in asked.items():
        if layout and (reason := why_not(layout, shapes[role])):
            raise ConfigError(f"layout.{role}={layout}: {reason}")
    if asked["teacher"] and (
        reason := batch_misfit(sequences, config.per_device_train_batch_size, asked["teacher"])
    ):
        raise ConfigError(
            f"layout.teacher={asked['teacher']}: {reason} (num_prompts_per_step="
            f"{config.num_prompts_per_step} x num_generations={config.num_generations})"
        )

    def teacher_fits(layout: Layout) -> bool:
        return (
            asked["teacher"] in (None, layout)
            and not why_not(layout, shapes["teacher"])
            and not batch_misfit(sequences, config.per_device_train_batch_size, layout)
            and _memory_fits(shapes["teacher"], layout, config)
        ) or layout == asked["teacher"]

    def student_fits(layout: Layout) -> bool:
        return asked["student"] in (None, layout) and not why_not(layout, shapes["student"])

    chosen = fit_roles(world_size, config.layout.placement, teacher_fits, student_fits)
    if chosen is None:
        raise ConfigError(
            f"layout.teacher={config.layout.teacher} layout.student={config.layout.student} "
            f"layout.placement={config.layout.placement}: does not fit {world_size} processes"
            + _needed(config.layout.placement, asked, world_size)
        )
    placement, teacher, student = chosen
    return placement, {"teacher": teacher, "student": student}


def _needed(placement: str, asked: dict[str, Layout | None], world_size: int) -> str:
    teacher, student = asked["teacher"], asked["student"]
    if not teacher or not student:
        return "; no layout of this size divides heads, layers and batch, and fits the memory"
    if placement == "colocated":
        return f"; colocated roles need {teacher.size} and {student.size} processes to be equal"
    return f"; separate roles need {teacher.size} + {student.size} = {teacher.size + student.size}"


def _memory_fits(shape: ModelShape, layout: Layout, config: TeacherGRPOConfig) -> bool:
    """Whether a device holds its share of a model in mixed-precision training: weight 2 bytes,
    gradient 4, reference 2; master weight and Adam 12, sharded over data parallel ranks by the
    distributed optimizer. A third of the device is left to activations and the engine's weights."""
    memory = device.total_memory()
    states = 12 / (layout.data if config.distributed_optimizer else 1)
    each = 6 + (2 if config.beta else 0) + states
    return memory is None or shape.parameters * each / layout.model_ranks <= memory * 2 / 3


def _engines(config: TeacherGRPOConfig, role: str, layout: Layout, shape: ModelShape) -> int:
    """How many engines serve the role; 0 in the settings leaves the choice to us."""
    tensor = getattr(config.rollout, f"{role}_tensor_parallel")
    key = f"rollout.{role}_tensor_parallel={tensor}"
    if tensor < 1 or shape.heads % tensor:
        raise ConfigError(f"{key}: {shape.heads} attention heads do not divide by it")
    if shape.groups % tensor and tensor % shape.groups:
        raise ConfigError(
            f"{key}: {shape.groups} key-value heads neither divide by it nor it by them"
        )
    if device.is_cuda() and layout.size % tensor:
        raise ConfigError(f"{key}: the role's {layout.size} devices do not divide by it")
    asked = getattr(config.rollout, f"{role}_engines")
    if asked == 0:
        return layout.size // tensor if device.is_cuda() else 1
    most = layout.size // tensor if device.is_cuda() else layout.size
    if asked < 0 or asked > most or layout.size % asked:
        raise ConfigError(
            f"rollout.{role}_engines={asked}: must divide the role's {layout.size} ranks "
            f"and be at most {most}"
        )
    return asked


def _fit_lengths(
    config: TeacherGRPOConfig,
    key: str,
    questions: list[Question],
    shapes: dict[str, ModelShape],
    tokenizers: dict[str, Tokenizer],
) -> tuple[list[Question], int, tuple[int, int]]:
    """Finds questions whose longest possible sequence exceeds a model's context.

    Returns:
        The questions kept, how many were dropped, and the longest (teacher, student) sequence.
    """
    kept, longest = [], (0, 0)
    for question in questions:
        needs = _sequence_lengths(config, question.text, tokenizers)
        excess = [
            f"{role}.path's context of {shapes[role].positions} tokens is less than the "
            f"{need} that prompt and completion may need"
            for role, need in needs.items()
            if need > shapes[role].positions
        ]
        if excess and config.data.overlong == "error":
            raise ConfigError(
                f"{key}: row {question.row} is too long: {excess[0]}; shorten it, lower the "
                "max_*_tokens settings, or set data.overlong=drop"
            )
        if not excess:
            kept.append(question)
            longest = (max(longest[0], needs["teacher"]), max(longest[1], needs["student"]))
    return kept, len(questions) - len(kept), longest


def _sequence_lengths(
    config: TeacherGRPOConfig, question: str, tokenizers: dict[str, Tokenizer]
) -> dict[str, int]:
    """The most tokens each model may have to hold for `question`. Text that one model writes for
    another is cut to the writer's limit in the reader's tokens, which bounds it here."""
    templates = config.templates

    def prompt(role: str, template: str, **fields: str) -> int:
        return len(tokenizers[role].encode_prompt(fill(template, question=question, **fields)))

    joints = 2  # tokens may split otherwise where the text is put into the template
    return {
        "teacher": prompt("teacher", templates.adaptive, approach="")
        + config.max_probe_tokens
        + config.max_completion_length
        + joints,
        "student": max(
            prompt("student", templates.baseline) + config.max_answer_tokens,
            prompt("student", templates.diagnostic) + config.max_probe_tokens,
            prompt("student", templates.with_teaching, teaching="")
            + config.max_completion_length
            + config.max_answer_tokens
            + joints,
        ),
    }


def _choice(key: str, value, known) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(known)}")


def _at_least(key: str, value, least) -> None:
    if value < least:
        raise ConfigError(f"{key}={value}: must be at least {least}")
