"""Estimates of KL(policy || reference) from sampled tokens.

With d = log p_ref - log p of a token that the policy sampled, k1 = -d, k2 = d^2 / 2 and
k3 = exp(d) - d - 1 (http://joschu.net/blog/kl-approx.html). The mean of k1, and of k3, is the
divergence; that of k2 is near it.

In the loss the gradient counts. Without bias correction k2 has, on average, the divergence's, k3
that of KL(reference || policy), and k1 none. With it (times the importance ratio, DeepSeek-V3.2,
arXiv:2512.02556, section 3.1) k1 and k3 have the divergence's. In the reward the value counts: use
k1.
"""

import torch
from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import KL_ESTIMATORS


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate, in nats, shaped like `log_probs`."""
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    gap = ref_log_probs - log_probs
    if estimator == "k1":
        return -gap
    if estimator == "k2":
        return gap.square() / 2
    return torch.expm1(gap) - gap


def kl_penalty(
    old_log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, beta: float, estimator: str
) -> Tensor:
    """What the KL takes from each sequence's reward: beta times its sum over the sequence's tokens
    (arXiv:2203.02155, equation 2).

    Args:
        old_log_probs, ref_log_probs, mask: [sequences, tokens]; the policy that sampled, without
            gradient.

    Returns:
        [sequences].
    """
    counted = mask > 0
    old, ref = old_log_probs.where(counted, 0.0), ref_log_probs.where(counted, 0.0)
    return beta * kl_estimate(old, ref, estimator).sum(1)
