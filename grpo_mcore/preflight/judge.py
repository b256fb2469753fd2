"""The run's own judge: whether it can be served, and whether any reward asks it."""

import os
from collections.abc import Sequence
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, JudgeServerConfig
from grpo_mcore.data.tokenizer import load_tokenizer
from grpo_mcore.rewards import RewardSource
from grpo_mcore.rewards.rim import asking_own_judge


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


def check_judge_used(sources: Sequence[RewardSource], path: str | None = None) -> None:
    """
    Args:
        path: of the run's own judge.

    Raises:
        ConfigError: for rewards without their judge, or a judge without rewards.
    """
    waiting = asking_own_judge(sources)
    if waiting and path is None:
        raise ConfigError(
            "reward_system.small.base_url=None: give the URL of an OpenAI-compatible endpoint, or "
            "judge.path for a judge of TeacherGRPOTrainer's own"
        )
    if path is not None and not waiting:
        raise ConfigError(
            f"judge.path={path}: no reward asks it; name rim in rewards, and leave "
            "reward_system.small.base_url out"
        )
