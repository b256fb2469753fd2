"""The reward functions that a configuration names."""

from collections.abc import Callable
from pathlib import Path

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.config.functions import load_function
from grpo_mcore.rewards import (
    AdaptiveTeachingReward,
    LikelihoodGainReward,
    RewardSource,
    leak_penalty,
)
from grpo_mcore.rewards.rim import RIMReward


def _adaptive(config: TeacherGRPOConfig) -> AdaptiveTeachingReward:
    return AdaptiveTeachingReward(
        degradation_penalty_multiplier=config.degradation_penalty_multiplier,
        efficiency_weight=config.efficiency_weight,
        formula=config.formula,
        answer_match=config.answer_match,
    )


def _likelihood_gain(config: TeacherGRPOConfig) -> LikelihoodGainReward:
    return LikelihoodGainReward(config.gain_per_token, config.gain_clip)


def _rim(config: TeacherGRPOConfig) -> RIMReward:
    return RIMReward(config=config.reward_system)


NAMED: dict[str, Callable[[TeacherGRPOConfig], RewardSource]] = {
    "adaptive": _adaptive,
    "likelihood_gain": _likelihood_gain,
    "rim": _rim,
    "leak_penalty": lambda config: leak_penalty,
}
"""Name in `rewards` -> what makes the reward function."""


def rewards_of(config: TeacherGRPOConfig) -> list[RewardSource]:
    """The functions of `config.rewards`, in order.

    Raises:
        ConfigError: for a name that is none of NAMED and no "package.module:function" that loads.
    """
    if not config.rewards:
        raise ConfigError(f"rewards={config.rewards}: name at least one of {', '.join(NAMED)}")
    return [NAMED[name](config) if name in NAMED else _users(name) for name in config.rewards]


def _users(name: str) -> Callable:
    if ":" not in name:
        raise ConfigError(
            f"rewards={name}: choose from {', '.join(NAMED)}, package.module:function"
        )
    return load_function(f"rewards={name}", name, Path.cwd())
