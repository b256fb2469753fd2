"""The GRPO loss on given log-probabilities.

With r = exp(log p - log p_old) and A the advantage, a token costs
    -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta * k3,
    k3 = exp(log p_ref - log p) - (log p_ref - log p) - 1
(arXiv:2402.03300, equations 3 and 4). The loss is a weighted sum over tokens; `token_weights` says
how each loss type weighs them. The weights of all ranks and micro-batches together are normalised
once, so how the batch was split does not matter.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


@dataclass(frozen=True)
class GRPOLossConfig:
    """beta: weight of the KL term; epsilon, epsilon_high: clipping range below and above 1."""

    beta: float = 0.04
    epsilon: float = 0.2
    epsilon_high: float | None = None


def token_weights(mask: Tensor, loss_type: str, max_completion_length: int) -> Tensor:
    """What each token of the whole batch weighs in the loss.

    Args:
        mask: [sequences, tokens] of the whole global batch, 1 where a token was sampled.
        loss_type: "grpo": every sequence the same, its tokens equal shares (arXiv:2402.03300);
            "dapo": every token the same (arXiv:2503.14476); "dr_grpo": every token 1 over
            sequences * max_completion_length (arXiv:2503.20783).
    """
    mask = mask.to(torch.float64)
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if loss_type == "dapo":
        return mask / mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return mask / (len(mask) * max_completion_length)
    raise ValueError(f"loss_type={loss_type}: choose one of {', '.join(LOSS_TYPES)}")


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative (Schulman's k3)."""
    gap = ref_log_probs - log_probs
    return gap.exp() - gap - 1


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    config: GRPOLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of the loss, and metrics as sums over its tokens: the totals over all
    parts are divided by the number of tokens, but for `loss`.

    Args:
        log_probs: [sequences, tokens], with gradient.
        old_log_probs: under the policy that sampled; None when that is this policy (one update a
            batch), so that the ratio is 1 and only its gradient counts.
        ref_log_probs: under the reference; None leaves the KL term out.
        advantages: [sequences].
        weights: [sequences, tokens] from `token_weights`; 0 where a token does not count.
    """
    counted = weights > 0
    log_probs = log_probs.where(counted, 0.0)
    old = log_probs.detach() if old_log_probs is None else old_log_probs.where(counted, 0.0)
    ratio = (log_probs - old).exp()
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clipped = ratio.clamp(1 - config.epsilon, 1 + high)
    advantage = advantages[:, None]
    per_token = -torch.min(ratio * advantage, clipped * advantage)
    weights = weights.to(per_token.dtype)
    clips = ((ratio < 1 - config.epsilon) & (advantage < 0)) | (
        (ratio > 1 + high) & (advantage > 0)
    )
    metrics = {"clip_ratio/region_mean": (clips & counted).sum().detach()}
    if config.beta and ref_log_probs is not None:
        kl = k3(log_probs, ref_log_probs.where(counted, 0.0))
        per_token = per_token + config.beta * kl
        metrics["kl"] = (kl * counted).sum().detach()
    loss = (per_token * weights).sum()
    return loss, metrics | {"loss": loss.detach()}
