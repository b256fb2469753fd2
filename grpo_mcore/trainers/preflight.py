"""Everything that can be found wrong with a job before it joins a world or loads a model.

Every rank checks the same and comes to the same result, so no rank waits for one that stopped.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from grpo_mcore import device
from grpo_mcore.config import (
    ConfigError,
    JudgeServerConfig,
    ModelConfig,
    TeacherGRPOConfig,
    TrainingConfig,
)
from grpo_mcore.data.questions import Question, load_questions
from grpo_mcore.data.tokenizer import Tokenizer, saved_tokenizer
from grpo_mcore.errors import FilesError
from grpo_mcore.models.expected import check_tensors
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.lora import check_lora
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import check_fp8_sizes, read_facts
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.trainers.batches import steps_per_epoch, with_batches, with_steps
from grpo_mcore.trainers.engines import check_servers, says_in_text
from grpo_mcore.trainers.layouts import choose_layout, choose_layouts, count_engines
from grpo_mcore.trainers.lengths import Lengths, fit_lengths
from grpo_mcore.trainers.settings import check_model, check_settings, check_training
from grpo_mcore.training.optimizer import check_optimizer

Config = TypeVar("Config", bound=TrainingConfig)


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
    steps_per_epoch: float

    @property
    def shape(self) -> ModelShape:
        """Of the model that is trained."""
        return self.shapes["teacher"]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokenizers["teacher"]

    @property
    def train_size(self) -> int:
        return len(self.train)

    def describe(self) -> str:
        roles = ", ".join(
            f"{name} {layout} (TPxPPxDP) with {self.engines[name]} "
            f"engine{'s' if self.engines[name] > 1 else ''}"
            for name, layout in self.layouts.items()
            if name in self.engines
        )
        if "judge" in self.layouts:
            roles += f", judge on {self.layouts['judge'].size}"
        line = f"layout: {self.placement}: {roles}"
        return (
            f"{line}\ndata: {self.dropped} questions dropped as too long" if self.dropped else line
        )


def check_job(
    config: TeacherGRPOConfig,
    world_size: int,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    tokenizer: Any = None,
) -> tuple[TeacherGRPOConfig, Job]:
    """Checks `config` for a job of `world_size` processes.

    Args:
        train_dataset, eval_dataset: in place of those in `config.data`.
        tokenizer: transformers' one of the teacher; None: the one saved with it.

    Returns:
        The configuration with numbers for all that it left open, and the job.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_settings(config)
    if config.max_answer_tokens is None:
        config = replace(config, max_answer_tokens=config.max_completion_length)
    shapes = {
        role: read_shape(f"{role}.path", getattr(config, role).path)
        for role in ("teacher", "student")
    }
    check_fp8_sizes("teacher", config.teacher, shapes["teacher"])
    placement, layouts = choose_layouts(config, shapes, world_size)
    check_adapters(config, config.teacher, shapes["teacher"])
    config = with_batches(config, layouts["teacher"].data)
    rollout = config.rollout
    engines = {role: count_engines(rollout, role, layouts[role], shapes[role]) for role in shapes}
    check_judge(config.judge, placement)
    data = config.data
    train_key, source = "train_dataset", train_dataset
    if source is None:
        train_key, source = "data.train", data.train
    train = load_questions(data, train_key, source, data.train_split)
    eval_key, source, held_out = "eval_dataset", eval_dataset, []
    if source is None:
        eval_key, source = "data.eval", data.eval
    if source is not None:
        held_out = load_questions(data, eval_key, source, data.eval_split)
        held_out = held_out[: data.eval_size or None]
    elif (config.metric_for_best_model or "").startswith("eval_"):
        raise ConfigError(
            f"metric_for_best_model={config.metric_for_best_model}: needs data.eval, there is none"
        )
    for role in shapes:
        check_weights(f"{role}.path", getattr(config, role).path, shapes[role])
    tokenizers = {
        role: load_tokenizer(
            f"{role}.path", getattr(config, role).path, tokenizer if role == "teacher" else None
        )
        for role in shapes
    }
    train, dropped, train_lengths = fit_lengths(config, train_key, train, shapes, tokenizers)
    held_out, more, eval_lengths = fit_lengths(config, eval_key, held_out, shapes, tokenizers)
    for key, given, kept in ((train_key, True, train), (eval_key, more, held_out)):
        if given and not kept:
            raise ConfigError(f"data.overlong=drop: every question of {key} is too long")
    per_epoch = steps_per_epoch(config, layouts["teacher"].data, len(train))
    job = Job(
        placement, layouts, shapes, tokenizers, train, held_out, dropped + more,
        Lengths(*(max(pair) for pair in zip(train_lengths, eval_lengths, strict=True))), engines,
        per_epoch,
    )  # fmt: skip
    for role, shape in shapes.items():
        longest = getattr(job.lengths, role)
        in_text = role == "teacher" and says_in_text(config)
        check_servers(role, config.rollout, getattr(config, role), shape, longest, in_text)
    return with_steps(config, per_epoch), job


def read_questions(config: TeacherGRPOConfig, job: Job, dataset: Any) -> list[Question]:
    """Further questions for the engines of `job`.

    Raises:
        ConfigError: for what is no dataset of questions, or longer than the job's own.
    """
    questions = load_questions(config.data, "eval_dataset", dataset, config.data.eval_split)
    kept, _, longest = fit_lengths(config, "eval_dataset", questions, job.shapes, job.tokenizers)
    for role, length in zip(job.shapes, longest, strict=True):
        most = getattr(job.lengths, role)
        if length > most:
            raise ConfigError(
                f"eval_dataset: a question needs {length} tokens of the {role}, whose engine was "
                f"started for {most}, the longest of the trainer's own data"
            )
    return kept


def open_model(
    config: Config, world_size: int, tokenizer: Any
) -> tuple[Config, Layout, ModelShape, Tokenizer]:
    """Layout, shape and tokenizer of the one model of `config`, all checked.

    Args:
        tokenizer: transformers' one in place of the model's own, or None.

    Returns:
        First the configuration with numbers for the batch sizes it left open.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_training(config)
    check_model("model", config.model)
    check_optimizer(config, "model", config.model, read_facts())
    shape = read_shape("model.path", config.model.path)
    check_fp8_sizes("model", config.model, shape)
    check_adapters(config, config.model, shape)
    layout = choose_layout(config, shape, world_size)
    check_weights("model.path", config.model.path, shape)
    own = load_tokenizer("model.path", config.model.path, tokenizer)
    return with_batches(config, layout.data), layout, shape, own


def check_reference(path: str, shape: ModelShape) -> None:
    """Checks the model in directory `path`, the reference of one of `shape`."""
    if read_shape("ref_model", path) != shape:
        raise ConfigError(f"ref_model={path}: is not of the shape of the model that is trained")
    check_weights("ref_model", path, shape)


def check_adapters(config: TrainingConfig, model: ModelConfig, shape: ModelShape) -> None:
    """Checks the adapters that `config` asks for, if any, against the model they adapt."""
    if config.peft_config is None:
        return
    check_lora("peft_config", config.peft_config, shape)
    for key in ("fp8", "fp8_param"):
        if getattr(model, key):
            raise ConfigError(f"peft_config: adapters cannot be trained beside {key}")


def check_judge(judge: JudgeServerConfig, placement: str) -> None:
    """Checks the run's own judge, if it has one.

    Raises:
        ConfigError: for one that cannot be served.
    """
    key, path = f"judge.path={judge.path}", judge.path
    if path is None:
        return
    check_judge_placed(judge, placement, device.is_cuda())
    on_host = os.environ.get("LOCAL_WORLD_SIZE")  # the launcher's process has none
    if device.is_cuda() and on_host and judge.tensor_parallel > int(on_host):
        raise ConfigError(
            f"judge.tensor_parallel={judge.tensor_parallel}: the judge runs on one host, which has "
            f"{on_host} of the job's processes"
        )
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{key}: is no directory with a model's config.json")
    if not load_tokenizer("judge.path", path).inner.chat_template:
        raise ConfigError(f"{key}: its tokenizer has no chat template, which a judge needs")


def check_judge_placed(judge: JudgeServerConfig, placement: str, on_gpus: bool) -> None:
    """
    Raises:
        ConfigError: for one that would share its GPU with colocated roles.
    """
    if judge.path and placement == "colocated" and on_gpus:
        raise ConfigError(
            f"judge.path={judge.path}: needs GPUs of its own; set layout.placement=separate and "
            f"start {judge.tensor_parallel} more processes, or name a server in "
            "reward_system.small.base_url"
        )


def load_tokenizer(key: str, path: str, tokenizer: Any = None) -> Tokenizer:
    """`tokenizer`, or if that is None the one in directory `path`, the value of setting `key`."""
    if tokenizer is not None:
        return Tokenizer(path, tokenizer)
    try:
        return Tokenizer(path, saved_tokenizer(path))
    except ValueError as error:
        raise ConfigError(f"{key}={path}: no tokenizer that loads: {error}") from error


def check_weights(key: str, path: str, shape: ModelShape) -> None:
    """Checks, by their headers, that the safetensors in directory `path`, the value of setting
    `key`, are whole and hold a model of `shape`."""
    try:
        check_tensors(HFReader(path), shape)
    except FilesError as error:  # which begins with the path
        raise ConfigError(f"{key}={error}") from error
