"""Checks of RIMReward's settings, before anything is asked."""

import math
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from grpo_mcore.config import RewardSystemConfig
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
    judges = active_judges(config)
    if not judges:
        raise ConfigError("reward_system.judges: all are disabled; enable at least one")
    for name, judge in judges.items():
        key = f"reward_system.judges.{name}"
        if not (math.isfinite(judge.weight) and judge.weight > 0):
            raise ConfigError(
                f"{key}.weight={judge.weight}: must be above 0; to leave the judge out, set "
                f"{key}.enabled=False"
            )
        if not {"question", "teaching"} <= fields_of(judge.prompt):
            raise ConfigError(f"{key}.prompt: needs {{question}} and {{teaching}}")
    for key, value, least, most in _ranges(config):
        if not least <= value <= most:
            limit = "at least" if most == math.inf else f"at most {most} and at least"
            raise ConfigError(f"reward_system.{key}={value}: must be {limit} {least}")
    if not config.temperatures:
        raise ConfigError("reward_system.temperatures=[]: give at least one")
    if not config.timeout > 0:
        raise ConfigError(f"reward_system.timeout={config.timeout}: must be above 0")
    for tier in ("small", "large"):
        _check_endpoint(f"reward_system.{tier}", getattr(config, tier))
    if config.cache is not None:
        Cache(config.cache).check()


def _ranges(config: RewardSystemConfig) -> Iterator[tuple[str, float, float, float]]:
    """Key, value and limits of each number."""
    for temperature in config.temperatures:
        yield "temperatures", temperature, 0, 2
    yield "large_temperature", config.large_temperature, 0, 2
    for key in ("variance_threshold", "uncertainty_threshold"):
        yield key, getattr(config, key), 0, 1
    rules = config.consistency
    for key, bound in vars(rules).items():
        if bound is not None:
            yield f"consistency.{key}", bound, 0, 1
    yield "max_workers", config.max_workers, 1, math.inf
    yield "max_retries", config.max_retries, 0, math.inf
    for tier in ("small", "large"):
        yield f"{tier}.max_tokens", getattr(config, tier).max_tokens, 1, math.inf


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
