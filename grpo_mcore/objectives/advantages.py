"""Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1)."""

from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""

SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, num_generations: int, scale: str) -> Tensor:
    """Each reward less its group's mean, over a standard deviation (n - 1 in the denominator).

    Args:
        rewards: [groups * num_generations], a group's samples side by side.
        scale: "group" divides by the group's deviation, "batch" by that of all rewards, "none" by
            nothing.
    """
    # In float32 the mean of equal rewards may differ from them by more than EPSILON forgives.
    groups = rewards.double().view(-1, num_generations)
    centred = groups - groups.mean(1, keepdim=True)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + EPSILON)
    elif scale == "batch":
        centred = centred / (groups.std() + EPSILON)
    elif scale != "none":
        raise ValueError(f"scale_rewards={scale}: choose one of {', '.join(SCALES)}")
    return centred.view(-1).to(rewards.dtype)
