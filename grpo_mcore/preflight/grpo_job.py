"""Everything that can be found wrong with a job of GRPOTrainer before models load."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from grpo_mcore.config import ConfigError, GRPOConfig
from grpo_mcore.data.prompts import Prompt, load_prompts
from grpo_mcore.data.sources import Rows, Table, open_dataset, open_eval_datasets
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.environments import EnvironmentSpec, check_environment, check_tools
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import steps_per_epoch, with_steps
from grpo_mcore.preflight.layouts import count_engines
from grpo_mcore.preflight.models import open_model
from grpo_mcore.preflight.servers import check_servers
from grpo_mcore.preflight.settings import check_group
from grpo_mcore.rollout.spec import says_in_text

PROMPT_COLUMNS = ("prompt", "question", "problem")
"""Columns that can be the prompt, the first there is."""


@dataclass(frozen=True)
class GRPOJob:
    """A checked job: what a GRPOTrainer needs beside its configuration.

    Attributes:
        max_model_len: the longest sequence that an engine can meet.
        steps_per_epoch: None for a stream.
    """

    config: GRPOConfig
    layout: Layout
    shape: ModelShape
    tokenizer: Tokenizer
    train: Rows[Prompt]
    prompt_column: str
    evals: dict[str, Rows[Prompt]]
    max_model_len: int
    engines: int
    tools: list[Callable]
    environment: EnvironmentSpec | None
    steps_per_epoch: float | None

    @property
    def train_size(self) -> int | None:
        return self.train.size

    def describe(self) -> str:
        engines = f"{self.engines} engine{'s' if self.engines > 1 else ''}"
        return f"layout: {self.layout} (TPxPPxDP) with {engines}"

    @cached_property
    def room(self) -> int:
        """Tokens of a prompt at most."""
        return prompt_room(self.config, self.shape)

    def open_evals(self, datasets: Any) -> dict[str, Rows[Prompt]]:
        """Evaluation prompts by the names of their datasets (`data.sources.open_eval_datasets`).

        Raises:
            ConfigError: for a dataset that cannot be evaluated on.
        """
        opened = open_eval_datasets("eval_dataset", datasets)
        for rows in opened.values():
            if rows.size is None:
                raise ConfigError(f"{rows.name}: is a stream; evaluate on one of known length")
        return {name: self.load(rows) for name, rows in opened.items()}

    def load(self, rows: Rows[dict]) -> Rows[Prompt]:
        """The prompts of a dataset."""
        schemas = check_tools(self.tools, self.tokenizer.inner, self.environment)
        return load_prompts(
            rows,
            self.tokenizer.inner,
            self.room,
            self.config.overlong,
            schemas,
            self.config.chat_template_kwargs,
            _prompt_column(rows),
        ).map(self._fitting)

    def _fitting(self, prompt: Prompt) -> Prompt:
        context = _context(self.config, self.shape)
        length = min(len(prompt.tokens) + self.config.max_completion_length, context)
        if length > self.max_model_len:
            raise ConfigError(
                f"needs {length} tokens of the engine, which was started for {self.max_model_len}, "
                "the most that the trainer's own data need"
            )
        return prompt

    def read_prompts(self, rows: Sequence[dict]) -> list[Prompt]:
        prompts = self.load(open_dataset("inputs", list(rows)))
        return [prompts[number] for number in range(prompts.size)]


def check_grpo(
    config: GRPOConfig,
    world_size: int,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: Any,
    tools: list[Callable],
    environment: Any,
) -> tuple[GRPOConfig, GRPOJob]:
    """Checks a job of `world_size` processes.

    Returns:
        The configuration with numbers for all that it left open, and the job.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_group(config)
    for key in ("stop", "structured_outputs"):
        if getattr(config, key) and (tools or environment is not None):
            raise ConfigError(
                f"{key}={getattr(config, key)}: tools and environments need turns that the model "
                "itself writes and ends; leave it out"
            )
    config, layout, shape, own_tokenizer = open_model(config, world_size, tokenizer)
    room = prompt_room(config, shape)
    if room < 1:
        raise ConfigError(
            f"max_completion_length={config.max_completion_length}: leaves no room for a prompt in "
            f"the model's context of {shape.positions} tokens"
        )
    shuffle_seed = config.seed if config.shuffle_dataset else None
    rows = open_dataset("train_dataset", train_dataset, shuffle_seed=shuffle_seed)
    per_epoch = steps_per_epoch(config, layout.data, rows.size)
    config = with_steps(config, per_epoch)
    job = GRPOJob(
        config,
        layout,
        shape,
        own_tokenizer,
        train=rows,
        prompt_column=_prompt_column(rows),
        evals={},
        max_model_len=_context(config, shape),
        engines=count_engines(config.rollout, "policy", layout, shape),
        tools=tools,
        environment=None if environment is None else check_environment(environment),
        steps_per_epoch=per_epoch,
    )
    if eval_dataset is None and (config.metric_for_best_model or "").startswith("eval_"):
        raise ConfigError(
            f"metric_for_best_model={config.metric_for_best_model}: needs eval_dataset, there is "
            "none"
        )
    train = job.load(rows)
    job = replace(job, train=train, evals=job.open_evals(eval_dataset))
    job = replace(job, max_model_len=_longest(job, config))
    in_text = says_in_text(config)
    check_servers("policy", config.rollout, config.model, shape, job.max_model_len, in_text)
    return config, job


def prompt_room(config: GRPOConfig, shape: ModelShape) -> int:
    """Tokens of a prompt at most: those asked for, or all that completions leave of the context.
    Where `max_sequence_length` cuts completions off, a prompt leaves them one token at least."""
    if config.max_sequence_length is None:
        room = shape.positions - config.max_completion_length
    else:
        room = _context(config, shape) - 1
    return room if config.max_prompt_length is None else min(room, config.max_prompt_length)


def _context(config: GRPOConfig, shape: ModelShape) -> int:
    """Tokens of a sequence at most."""
    return min(shape.positions, config.max_sequence_length or shape.positions)


def _longest(job: GRPOJob, config: GRPOConfig) -> int:
    """Tokens of the longest sequence. Of tables all prompts are read for it, so that one too long
    is found now."""
    prompt = job.room
    readable = [job.train, *job.evals.values()]
    if all(isinstance(rows, Table) for rows in readable):
        prompt = max(len(rows[n].tokens) for rows in readable for n in range(rows.size))
    if job.environment:  # whose first observation belongs to the prompt
        prompt = job.room
    return min(job.max_model_len, prompt + config.max_completion_length)


def _prompt_column(rows: Rows[dict]) -> str:
    return next((name for name in PROMPT_COLUMNS if name in rows.columns), PROMPT_COLUMNS[0])
