"""Starts a role's rollout engines."""

from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import LoraConfig, ModelConfig, RolloutConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rollout.pool import RolloutPool


def start_engines(
    role: Role,
    model: ModelConfig,
    tokenizer: Tokenizer,
    max_model_len: int,
    engines: int,
    rollout: RolloutConfig,
    output_dir: str,
    lora: LoraConfig | None,
) -> RolloutPool:
    """Starts the role's engines. On a CPU they load while this process builds its models; on a GPU
    it waits, because vLLM sizes its cache by the device memory it finds free.

    Args:
        lora: of the adapters that are trained.
    """
    pool = RolloutPool(
        role,
        model.path,
        model.dtype,
        max_model_len,
        tokenizer.stop_token_ids(),
        engines,
        getattr(rollout, f"{role.name}_tensor_parallel"),
        rollout,
        Path(output_dir) / "logs",
        lora if rollout.lora_sync == "adapters" else None,
    )
    if device.is_cuda():
        pool.wait_until_ready()
    return pool
