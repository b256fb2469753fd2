"""A model as it is trained and an engine as it samples, side by side, for the tools that compare
the two."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import ModuleList

from grpo_mcore.checkpoint.stored import check_stored, find_model
from grpo_mcore.config import ConfigError, ModelConfig, RolloutConfig, TrainingConfig
from grpo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from grpo_mcore.models.build import load_weights
from grpo_mcore.models.expected import check_weights
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join, world_size
from grpo_mcore.preflight.layouts import count_engines, never, why_not, with_experts
from grpo_mcore.preflight.settings import check_model
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.spec import PROBE, RECEIVER, EngineSpec
from grpo_mcore.rollout.start import start_engines
from grpo_mcore.training.split import Split
from grpo_mcore.weights.sync import WeightSync

PROMPTS = (
    "A farmer has 17 sheep and buys 5 more. How many are there now?",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 2, 3, 4,",
)
"""What is asked where nothing else is given."""


@dataclass(frozen=True)
class Pair:
    """The two, seen from one rank; nothing is synced yet.

    Attributes:
        chunks: this rank's part of the Megatron model, with its weights.
        prompts: those asked for, as tokens.
    """

    role: Role
    shape: ModelShape
    tokenizer: Tokenizer
    chunks: ModuleList
    split: Split
    pool: RolloutPool
    sync: WeightSync
    prompts: list[list[int]]

    def push_from(self, path: str, dtype: str) -> None:
        """Gives the engine the weights in the Hugging Face directory `path`, which are of the same
        shape; the Megatron model has its own again then."""
        own = {name: p.clone() for name, p in self.chunks.named_parameters()}
        load_weights(self.chunks, self.shape, ModelConfig(path, dtype), self.role)
        self.sync.push(1)
        with torch.no_grad():
            for name, parameter in self.chunks.named_parameters():
                parameter.copy_(own[name])


def pair_parser(description: str, output: Path) -> ArgumentParser:
    """A command line that `open_pair` understands. `output`: where the findings go by default."""
    parser = ArgumentParser(description=description)
    parser.add_argument("model", help="a Hugging Face directory, or a run's checkpoint(s)")
    parser.add_argument("--layout", default="1x1x1", help="of the trainer's side, TPxPPxDP")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16, on both sides")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--virtual-pipeline", type=int, default=1)
    parser.add_argument("--engine-tensor-parallel", type=int, default=1)
    parser.add_argument("--prompts", type=Path, help="a text file with a prompt a line")
    parser.add_argument("--output", type=Path, default=output, help="JSON")
    return parser


@contextmanager
def open_pair(
    arguments: Namespace, completion: int, probed: bool = False, engine_model: str | None = None
) -> Iterator[Pair]:
    """Loads the model and starts one engine, which waits for its weights. Called by all ranks of
    the job.

    Args:
        arguments: as of `pair_parser`.
        completion: tokens that will be sampled after each prompt at most.
        probed: what the engine's modules compute can be looked at (`Engine.call("probe", ...)`).
        engine_model: a directory for `push_from`.

    Raises:
        ConfigError: for what cannot work, before anything loads.
    """
    stored = find_model(arguments.model)
    model = ModelConfig(
        stored.directory,
        arguments.dtype,
        sequence_parallel=arguments.sequence_parallel,
        expert_parallel=arguments.expert_parallel,
        virtual_pipeline=arguments.virtual_pipeline,
    )
    check_model("model", model)
    shape = check_stored("model", stored)
    if engine_model:
        if read_shape("engine_model", engine_model) != shape:
            raise ConfigError(f"engine_model={engine_model}: is not of the model's shape")
        check_weights("engine_model", engine_model, shape)
    layout = _check_layout(arguments.layout, shape, model)
    rollout = RolloutConfig(policy_tensor_parallel=arguments.engine_tensor_parallel)
    count_engines(rollout, "policy", layout, shape)
    tokenizer = load_tokenizer("model", model.path)
    prompts = _read_prompts(arguments.prompts, tokenizer)
    longest = max(map(len, prompts)) + completion
    if longest > shape.positions:
        raise ConfigError(
            f"prompts: with {completion} tokens after it the longest makes {longest}; the model "
            f"has room for {shape.positions}"
        )
    with join({"policy": layout}, "colocated", rollout.deadline_seconds) as world:
        role = world.roles["policy"]
        log_dir = str(arguments.output.parent)
        spec = EngineSpec(
            model.path,
            model.dtype,
            longest,
            tokenizer.stop_token_ids(),
            rollout.policy_tensor_parallel,
            worker_extension=PROBE if probed else RECEIVER,
        )
        pool = start_engines(role, spec, 1, rollout, log_dir)
        try:
            chunks = stored.load(shape, model, role, seed=0)
            pool.wait_until_ready()
            yield Pair(
                role,
                shape,
                tokenizer,
                chunks,
                Split(role, model, TrainingConfig(per_device_train_batch_size=1)),
                pool,
                WeightSync(chunks, shape, role, pool, rollout.bucket_megabytes),
                prompts,
            )
        finally:
            pool.close()


def _check_layout(text: str, shape: ModelShape, model: ModelConfig) -> Layout:
    layout = Layout.parse("layout", text)
    if reason := never(shape, model) or why_not(layout, shape, model):
        raise ConfigError(f"layout={layout}: {reason}")
    if layout.size != world_size():
        raise ConfigError(
            f"layout={layout}: needs {layout.size} processes, there are {world_size()}; start it "
            f"with torchrun --nproc-per-node {layout.size}"
        )
    return with_experts(layout, model)


def _read_prompts(file: Path | None, tokenizer: Tokenizer) -> list[list[int]]:
    if file is None:
        texts = list(PROMPTS)
    elif not file.is_file():
        raise ConfigError(f"prompts={file}: no such file")
    else:
        texts = [line for line in file.read_text().splitlines() if line.strip()]
    prompts = [tokenizer.encode(text) for text in texts]
    if not prompts or not all(prompts):
        raise ConfigError(f"prompts={file}: a prompt without tokens")
    return prompts
