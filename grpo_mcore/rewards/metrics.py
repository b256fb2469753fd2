"""What a step's rewards are like, under TRL's names."""

from collections.abc import Sequence

from torch import Tensor

from grpo_mcore.objectives.advantages import groups_without_spread
from grpo_mcore.rewards.specs import RewardSpec


def reward_metrics(specs: Sequence[RewardSpec], rewards: Tensor) -> dict[str, float]:
    """`rewards/<name>/mean` and `rewards/<name>/std` (n - 1 in the denominator) of the samples a
    function has scored; a number that too few samples define is left out.

    Args:
        rewards: [samples, functions] of the whole step.
    """
    metrics = {}
    for spec, column in zip(specs, rewards.double().T, strict=True):
        scored = column[~column.isnan()]
        if len(scored) > 0:
            metrics[f"rewards/{spec.name}/mean"] = scored.mean().item()
        if len(scored) > 1:
            metrics[f"rewards/{spec.name}/std"] = scored.std().item()
    return metrics


def group_metrics(rewards: Tensor, num_generations: int) -> dict[str, float]:
    """
    Args:
        rewards: [samples], summed over the functions, a group's side by side; NaN where there is
            none.
    """
    scored = rewards[~rewards.isnan()]
    flat = groups_without_spread(rewards, num_generations).float().mean().item()
    found = {"frac_reward_zero_std": flat}
    if len(scored) > 0:
        found["reward"] = scored.mean().item()
    if len(scored) > 1:
        found["reward_std"] = scored.std().item()
    return found
