"""How far the policy has moved from the one that sampled."""

from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import IMPORTANCE_SAMPLING_LEVELS


def importance_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """The importance ratio of the policy over the one before the update.

    Args:
        log_ratio: [sequences, tokens], log p - log p_old, finite everywhere.
        mask: [sequences, tokens], whole sequences.
        level: "token": exp(log_ratio) [sequences, tokens] (arXiv:1707.06347, equation 6);
            "sequence": the geometric mean over the sequence's tokens [sequences, 1] (GSPO,
            arXiv:2507.18071, equation 7).
    """
    check_choice("importance_sampling_level", level, IMPORTANCE_SAMPLING_LEVELS)
    if level == "sequence":
        return sequence_mean(log_ratio, mask).exp()
    return log_ratio.exp()


def off_policy_mask(
    log_probs: Tensor,
    sampling_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    threshold: float,
) -> Tensor:
    """The sequences to keep: of no negative advantage, or near to what sampled them
    (DeepSeek-V3.2, arXiv:2512.02556, equation 9).

    Args:
        sampling_log_probs: [sequences, tokens], the engine's, or else those before the update; a
            NaN (the engine could not tell) counts as no distance.
        advantages: [sequences, 1] or [sequences, tokens].
        threshold: of the mean over tokens of sampling_log_probs - log_probs, in nats.

    Returns:
        Booleans shaped like `advantages`.
    """
    distance = (sampling_log_probs - log_probs.detach()).nan_to_num(nan=0.0)
    return (advantages >= 0) | (sequence_mean(distance, mask) <= threshold)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """[sequences, 1]: the mean of `values` over each sequence's tokens, 0 where it has none."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
