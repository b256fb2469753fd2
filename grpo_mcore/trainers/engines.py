"""Starts a role's rollout engines."""

from functools import partial
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, GroupConfig, ModelConfig, RolloutConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.families import shape_of
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.server import describe, misfit
from grpo_mcore.rollout.spec import EngineSpec

TEXTS = ("stop", "bad_words", "structured_outputs")
"""Settings of sampling that engines need a tokenizer for."""


def start_engines(
    role: Role,
    spec: EngineSpec,
    engines: int,
    rollout: RolloutConfig,
    output_dir: str,
    mailbox: Mailbox | None = None,
) -> RolloutPool:
    """Starts the role's engines. On a CPU they load while this process builds its models; on a GPU
    it waits, because vLLM sizes its cache by the device memory it finds free. Other roles hear of
    their work through the `mailbox`."""
    pool = RolloutPool(role, spec, engines, rollout, Path(output_dir) / "logs")
    if mailbox:
        pool.beat = partial(mailbox.beat, role.name)
    if device.is_cuda():
        pool.wait_until_ready()
    return pool


def spec_of_trained(
    config: GroupConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    max_model_len: int,
    tensor_parallel: int,
) -> EngineSpec:
    """Of engines that sample from the model that is trained, as `config` says."""
    return EngineSpec(
        model.path,
        model.dtype,
        max_model_len,
        tokenizer.stop_token_ids(),
        tensor_parallel,
        trains_adapters=config.peft_config is not None,
        tokenizer=tokenizer.inner if says_in_text(config) else None,
        lora=config.peft_config if config.rollout.lora_sync == "adapters" else None,
    )


def says_in_text(config: GroupConfig) -> bool:
    """Whether sampling has settings that an engine needs a tokenizer for."""
    return any(getattr(config, name) for name in TEXTS)


def check_servers(
    role: str,
    rollout: RolloutConfig,
    model: ModelConfig,
    shape: ModelShape,
    max_model_len: int,
    with_tokenizer: bool,
) -> None:
    """Asks the servers of `role`, if there are any, whether they are up and suit a model of
    `shape`, sequences of `max_model_len` tokens and (`with_tokenizer`) requests in text.

    Raises:
        ConfigError: for the first that does not.
    """
    for url in getattr(rollout, f"{role}_servers"):
        key = f"rollout.{role}_servers={url}"
        try:
            found = describe(url)
        except EngineError as error:
            raise ConfigError(f"{key}: {error}") from error
        if reason := misfit(found, max_model_len, model.dtype):
            raise ConfigError(f"{key}: {reason}")
        if with_tokenizer and not found["has_tokenizer"]:
            raise ConfigError(f"{key}: has no tokenizer, which {' and '.join(TEXTS)} need")
        other = shape_of(found["shape"], f"{key}: its model")
        if other != shape:
            named = next(n for n in vars(shape) if getattr(shape, n) != getattr(other, n))
            raise ConfigError(
                f"{key}: serves a model whose {named} is {getattr(other, named)}; that of "
                f"{model.path} is {getattr(shape, named)}"
            )
