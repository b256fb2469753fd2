"""Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1), of one reward or several.

A NaN is a reward that was not given (`None`): it takes no part in any mean or deviation, and a
sample without any reward has advantage 0.
"""

import torch
from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import (
    ADVANTAGE_ESTIMATORS,
    AGGREGATIONS,
    SCALES,
)
from grpo_mcore.errors import ConfigError

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""
LEAVE_ONE_OUT_EPSILON = 1e-6
"""The same for leave-one-out, as NeMo RL does."""
SAME = 1e-8
"""Rewards closer than this are the same."""


def compute_advantages(
    rewards_per_func: Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
    reward_weights: list[float] | None = None,
    advantage_estimator: str = "group",
    penalties: Tensor | None = None,
) -> Tensor:
    """The advantage of each sample of the whole batch.

    Args:
        rewards_per_func: [groups * num_generations, functions], a group's samples side by side.
        multi_objective_aggregation: "sum_then_normalize" makes `group_advantages` of the weighted
            sum; "normalize_then_sum" (GDPO, arXiv:2601.05242) makes them of each reward, scaled by
            its group's deviation, and brings their weighted sum to mean 0 and deviation 1 over the
            batch.
        penalties: [samples], taken from the weighted sum (`kl_penalty`).

    Returns:
        [samples], finite, in the dtype of the rewards.

    Raises:
        ConfigError: for a choice that does not exist, or weights of the wrong number.
    """
    check_choice("multi_objective_aggregation", multi_objective_aggregation, AGGREGATIONS)
    if multi_objective_aggregation == "sum_then_normalize":
        rewards = sum_rewards(rewards_per_func, reward_weights)
        if penalties is not None:
            rewards = rewards - penalties
        return group_advantages(rewards, num_generations, scale_rewards, advantage_estimator)
    if penalties is not None:
        raise ConfigError(
            "multi_objective_aggregation=normalize_then_sum: takes no KL in the reward"
        )
    each = [
        _centre_and_scale(column, num_generations, "group", advantage_estimator)
        for column in rewards_per_func.double().unbind(1)
    ]
    scored = ~rewards_per_func.isnan().all(1)
    total = sum_rewards(torch.stack(each, 1), reward_weights).nan_to_num(nan=0.0)
    total = total.where(scored, torch.nan)
    centred = (total - total.nanmean()) / (_deviation(total, 0) + EPSILON)
    return centred.nan_to_num(nan=0.0).to(rewards_per_func.dtype)


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    advantage_estimator: str = "group",
) -> Tensor:
    """Each reward less its group's baseline, over a standard deviation (n - 1 in the denominator).

    Args:
        rewards: [groups * num_generations], a group's samples side by side.
        scale_rewards: "group" divides by the group's deviation, "batch" by that of all rewards,
            "none" by nothing.
        advantage_estimator: "group": the baseline is the group's mean; "loo": the mean of the
            others of the group (RLOO, arXiv:2402.14740), and its deviation theirs too, unless they
            are all the same.

    Raises:
        ConfigError: for a choice that does not exist.
    """
    # In float32 the mean of equal rewards may differ from them by more than EPSILON forgives.
    found = _centre_and_scale(rewards.double(), num_generations, scale_rewards, advantage_estimator)
    return found.nan_to_num(nan=0.0).to(rewards.dtype)


def sum_rewards(rewards_per_func: Tensor, reward_weights: list[float] | None = None) -> Tensor:
    """[samples]: the weighted sum over functions of the rewards given; NaN where none was.

    Raises:
        ConfigError: unless there is a weight for each function.
    """
    functions = rewards_per_func.shape[1]
    weights = [1.0] * functions if reward_weights is None else list(reward_weights)
    if len(weights) != functions:
        raise ConfigError(
            f"reward_weights={weights}: needs one weight for each of {functions} reward functions"
        )
    total = (rewards_per_func * rewards_per_func.new_tensor(weights)).nansum(1)
    return total.where(~rewards_per_func.isnan().all(1), torch.nan)


def groups_without_spread(rewards: Tensor, num_generations: int) -> Tensor:
    """Booleans [groups]: the groups whose rewards [samples] are all the same, or fewer than two,
    and which therefore teach nothing. Their share is TRL's `frac_reward_zero_std`."""
    groups = rewards.view(-1, num_generations)
    missing = groups.isnan()
    highest = groups.masked_fill(missing, -torch.inf).amax(1)
    lowest = groups.masked_fill(missing, torch.inf).amin(1)
    return highest - lowest <= SAME


def _centre_and_scale(
    rewards: Tensor, num_generations: int, scale_rewards: str, advantage_estimator: str
) -> Tensor:
    """[samples], NaN where the reward is missing or has none to be compared with."""
    check_choice("scale_rewards", scale_rewards, SCALES)
    check_choice("advantage_estimator", advantage_estimator, ADVANTAGE_ESTIMATORS)
    groups = rewards.view(-1, num_generations)
    if advantage_estimator == "group":
        centred = groups - groups.nanmean(1, keepdim=True)
        deviation = _deviation(groups, 1)[:, None] + EPSILON
    else:
        # [groups, one, the others]
        itself = torch.eye(num_generations, dtype=torch.bool, device=groups.device)
        others = groups[:, None].expand(-1, num_generations, -1).masked_fill(itself, torch.nan)
        centred = groups - others.nanmean(2)
        deviation = _deviation(others, 2)
        # Others that are all the same give no scale: divided by next to nothing, one sample would
        # outweigh all the batch.
        deviation = (deviation + LEAVE_ONE_OUT_EPSILON).where(deviation > EPSILON, 1.0)
    if scale_rewards == "group":
        centred = centred / deviation
    elif scale_rewards == "batch":
        centred = centred / (_deviation(rewards, 0) + EPSILON)
    return centred.view(-1)


def _deviation(values: Tensor, dim: int) -> Tensor:
    """Standard deviation of what is not NaN; NaN of fewer than two."""
    count = (~values.isnan()).sum(dim)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim)
    return (squares / (count - 1)).sqrt().where(count > 1, torch.nan)
