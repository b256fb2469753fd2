"""Entropy: tokens chosen by it, the bonus for it, and the coefficient that adapts to it."""

import math

from torch import Tensor

from grpo_mcore.config.objective import ObjectiveConfig


def high_entropy_mask(entropies: Tensor, mask: Tensor, top_entropy_quantile: float) -> Tensor:
    """The tokens of highest entropy ("Beyond the 80/20 rule", arXiv:2506.01939).

    Args:
        entropies: [sequences, tokens] of the whole update, in nats.
        mask: [sequences, tokens] of the same.
        top_entropy_quantile: the share to keep; 0 keeps the very highest. Equals of the lowest one
            kept are kept too.

    Returns:
        Booleans [sequences, tokens].
    """
    counted = mask > 0
    values = entropies[counted].float()
    if not len(values):
        return counted
    # The lowest one kept is the first not below the quantile, which TRL takes in float32; the slack
    # absorbs the rounding of its rank.
    rank = math.ceil((1 - top_entropy_quantile) * (len(values) - 1) - 1e-6)
    return counted & (entropies >= values.kthvalue(rank + 1).values)


def entropy_bonus(entropies: Tensor, weights: Tensor, entropy_coef: float) -> Tensor:
    """This part's share of what the loss is lowered by: the coefficient times the mean entropy.

    Args:
        entropies: [sequences, tokens], with gradient.
        weights: [sequences, tokens], `equal_weights` of the mask, or of the high-entropy mask where
            there is one, whatever the loss type.
    """
    return entropy_coef * (entropies.where(weights > 0, 0.0) * weights.to(entropies.dtype)).sum()


class EntropyController:
    """The coefficient of the entropy bonus: fixed, or adapted after every update (Skywork-OR1,
    arXiv:2505.22312).

    Attributes:
        coef, last_entropy: all that changes.
    """

    def __init__(self, config: ObjectiveConfig):
        self.config = config
        self.coef = config.entropy_coef
        self.last_entropy = math.inf

    def state(self) -> list[float]:
        """What a checkpoint keeps, for `restore`."""
        return [self.coef, self.last_entropy]

    def restore(self, state: list[float] | None) -> None:
        """Goes on from a `state`; None: from the beginning."""
        if state is not None:
            self.coef, self.last_entropy = state

    @property
    def applied(self) -> float:
        """The coefficient for the next update: 0 while entropy is above the target, if adaptive."""
        above = self.last_entropy > self.config.entropy_target
        return 0.0 if self.config.use_adaptive_entropy and above else self.coef

    def update(self, mean_entropy: float) -> None:
        """Moves an adaptive coefficient one step, up if the mean entropy of the update just made
        (over the tokens the bonus acts on, in nats) is at or below the target, else down."""
        config = self.config
        if not config.use_adaptive_entropy:
            return
        if mean_entropy <= config.entropy_target:
            self.coef = min(self.coef + config.entropy_coef_delta, config.entropy_coef_max)
        else:
            self.coef = max(self.coef - config.entropy_coef_delta, config.entropy_coef_min)
        self.last_entropy = mean_entropy
