"""Checks of RIMReward's settings, before anything is asked."""

import os
from urllib.parse import urlsplit

from grpo_mcore.config import RewardSystemConfig
from grpo_mcore.config.bounds import check_bounds
from grpo_mcore.config.reward_system import JUDGES, JudgeConfig, JudgeModelConfig
from grpo_mcore.data.text import fields_of
from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards.rim.endpoint import Cache


def active_judges(config: RewardSystemConfig) -> dict[str, JudgeConfig]:
    judges = {name: getattr(config.judges, name) for name in JUDGES}
    return {name: judge for name, judge in judges.items() if judge.enabled}


def check_reward_system(config: RewardSystemConfig) -> None:
    """
    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_bounds(config, "reward_system.")
    judges = active_judges(config)
    if not judges:
        raise ConfigError("reward_system.judges: all are disabled; enable at least one")
    for name, judge in judges.items():
        key = f"reward_system.judges.{name}"
        if not {"question", "teaching"} <= fields_of(judge.prompt):
            raise ConfigError(f"{key}.prompt: needs {{question}} and {{teaching}}")
    if not config.temperatures:
        raise ConfigError("reward_system.temperatures=[]: give at least one")
    for tier in ("small", "large"):
        _check_endpoint(f"reward_system.{tier}", getattr(config, tier))
    if config.cache is not None:
        Cache(config.cache).check()


def _check_endpoint(key: str, model: JudgeModelConfig) -> None:
    if model.base_url is not None:
        parts = urlsplit(model.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{key}.base_url={model.base_url}: is no URL such as http://host:8000/v1"
            )
    elif model.api_key_env is not None:
        raise ConfigError(f"{key}.api_key_env={model.api_key_env}: needs {key}.base_url")
    if model.api_key_env is not None and not os.environ.get(model.api_key_env):
        raise ConfigError(
            f"{key}.api_key_env={model.api_key_env}: the environment has no such variable"
        )
