"""Starts a role's rollout engines."""

from functools import partial
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import GroupConfig, ModelConfig, RolloutConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.spec import EngineSpec, says_in_text


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
