"""Everything that can be found wrong with a job of TeacherGRPOTrainer before it joins a world or
loads a model."""

from dataclasses import dataclass, replace
from typing import Any

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.data.questions import Question, load_questions
from grpo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from grpo_mcore.models.expected import check_weights
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import check_fp8_sizes
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import steps_per_epoch, with_batches, with_steps
from grpo_mcore.preflight.judge import check_judge
from grpo_mcore.preflight.layouts import choose_layouts, count_engines
from grpo_mcore.preflight.lengths import Lengths, check_references, fit_lengths
from grpo_mcore.preflight.models import check_adapters
from grpo_mcore.preflight.servers import check_servers
from grpo_mcore.preflight.settings import check_settings
from grpo_mcore.rollout.spec import says_in_text


@dataclass(frozen=True)
class TeachingJob:
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
) -> tuple[TeacherGRPOConfig, TeachingJob]:
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
    job = TeachingJob(
        placement, layouts, shapes, tokenizers, train, held_out, dropped + more,
        Lengths(*(max(pair) for pair in zip(train_lengths, eval_lengths, strict=True))), engines,
        per_epoch,
    )  # fmt: skip
    for role, shape in shapes.items():
        longest = getattr(job.lengths, role)
        in_text = role == "teacher" and says_in_text(config)
        check_servers(role, config.rollout, getattr(config, role), shape, longest, in_text)
    return with_steps(config, per_epoch), job


def read_questions(
    config: TeacherGRPOConfig, job: TeachingJob, dataset: Any, likelihood: bool = False
) -> list[Question]:
    """Further questions for the engines of `job`.

    Args:
        likelihood: whether the student is asked how likely it finds their right answers.

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
    if likelihood:
        check_references(config, kept, job.shapes["student"], job.tokenizers["student"])
    return kept
