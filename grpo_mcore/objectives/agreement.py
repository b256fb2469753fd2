"""How closely the trainer's log-probabilities agree with the rollout engine's."""

import torch
from torch import Tensor

from grpo_mcore.objectives.metrics import mean_of


def agreement(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Metrics of a part's sampled tokens, as `metrics.combine` wants them; a NaN of the engine (it
    could not tell) is left out.

    `mismatch` is the mean of exp(|trainer - engine|), 1 when both agree; `rollout_kl` is the k3
    estimate of KL(engine || trainer); `max` is the largest absolute difference.
    """
    known = (mask > 0) & ~rollout_log_probs.isnan()
    gap = (log_probs - rollout_log_probs).where(known, 0.0).double()
    return {
        "mismatch": mean_of(gap.abs().exp(), known),
        "rollout_kl": mean_of(torch.expm1(gap) - gap, known),
        "max": gap.abs().max() if gap.numel() else gap.new_zeros(()),
    }
