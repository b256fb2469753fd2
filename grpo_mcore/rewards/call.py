"""Calls reward functions and refuses what cannot be trained on."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

from grpo_mcore.errors import KnownError

RewardFunction = Callable[..., Sequence[float]]
"""(prompts, completions, **columns) -> one float for each completion."""


class RewardError(KnownError, RuntimeError):
    """A reward function failed; the text names it and the step."""


def reward_name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def call_rewards(
    function: RewardFunction,
    step: int,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: dict[str, Sequence],
) -> list[float]:
    """The rewards of `function` for a step's completions.

    Args:
        columns: what the function is given beside them, by name.

    Raises:
        RewardError: when it raises, or returns the wrong number of values, or one that is not a
            finite number.
    """
    name = reward_name(function)
    try:
        rewards = function(prompts=prompts, completions=completions, **columns)
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
    except Exception as error:
        raise RewardError(
            f"reward function {name} failed at step {step}: {type(error).__name__}: {error}"
        ) from error
    if len(rewards) != len(completions):
        raise RewardError(
            f"reward function {name} returned {len(rewards)} values for {len(completions)} "
            f"completions at step {step}"
        )
    for place, reward in enumerate(rewards):
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise RewardError(
                f"reward function {name} returned {reward!r} for completion {place} at step "
                f"{step}; a finite number is needed"
            )
    return [float(reward) for reward in rewards]
