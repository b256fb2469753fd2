"""How closely the trainer's log-probabilities agree with the rollout engine's."""

import torch
from torch import Tensor


def agreement_sums(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sums and a maximum over sampled tokens, to be totalled over parts and divided by the tokens.

    `mismatch` is exp(|trainer - engine|), 1 when both agree; `rollout_kl` is the k3 estimate of
    KL(engine || trainer); `max` is the largest absolute difference.
    """
    gap = (log_probs - rollout_log_probs).where(mask > 0, 0.0).double()
    return {
        "mismatch": (gap.abs().exp() * mask).sum(),
        "rollout_kl": ((gap.exp() - gap - 1) * mask).sum(),
        "max": gap.abs().max() if gap.numel() else torch.zeros(()),
    }
