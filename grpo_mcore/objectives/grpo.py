"""The GRPO family's loss on given log-probabilities.

With A the advantage and r the importance ratio (`ratios`), the policy term of a token is

    -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
    -stop(min(r, epsilon_high)) A log p    of "cispo"
    -(4 / t) sigmoid(t (r - 1)) A          of "sapo"
    -stop(phi(w)) A log p                  of "vespo"

times the off-policy mask, the high-entropy mask and the rollout correction, plus beta times the KL.
`weights` says how much each token counts; docs/objectives.md has the rest.
"""

import math

import torch
from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import LOSS_TYPES, ObjectiveConfig
from grpo_mcore.objectives.kl import kl_estimate
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.objectives.ratios import importance_ratio, off_policy_mask, sequence_mean

LOG_RATIO_LIMIT = 20.0
LOG_WEIGHT_FLOOR = math.log(1e-8)
"""VESPO's own bounds, so that no weight overflows."""


def grpo_loss(
    log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: ObjectiveConfig,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    sampling_log_probs: Tensor | None = None,
    importance_sampling_ratio: Tensor | None = None,
    entropy_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of the loss, and its metrics, as `metrics.combine` wants them.

    Args:
        log_probs: [sequences, tokens], with gradient; a part holds whole sequences.
        advantages: [sequences] or [sequences, tokens].
        weights: [sequences, tokens] from `token_weights` of the whole update; 0 where a token does
            not count, whatever stands there.
        old_log_probs: before the update; None when that is this policy (one update a batch), so
            that the ratio is 1 and only its gradient counts.
        ref_log_probs: under the reference model; wanted where the loss has a KL term.
        sampling_log_probs: the engine's, for the off-policy mask; None: `old_log_probs`.
        importance_sampling_ratio: [sequences, tokens] or [sequences, 1] from `rollout_correction`.
        entropy_mask: [sequences, tokens] from `high_entropy_mask`.

    Raises:
        ConfigError: for an unknown loss type, level or estimator.
        ValueError: without reference log-probabilities for the KL term.
    """
    check_choice("loss_type", config.loss_type, LOSS_TYPES)
    mask = weights > 0
    log_probs = log_probs.where(mask, 0.0)
    old = log_probs.detach() if old_log_probs is None else old_log_probs.where(mask, 0.0)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    log_ratio = log_probs - old
    ratio = importance_ratio(log_ratio, mask, config.importance_sampling_level)

    if config.loss_type == "cispo":
        term, metrics = _cispo(log_probs, ratio, advantages, mask, config)
    elif config.loss_type == "sapo":
        term, metrics = _sapo(ratio, advantages, config), {}
    elif config.loss_type == "vespo":
        correction, importance_sampling_ratio = importance_sampling_ratio, None
        term, metrics = _vespo(log_probs, log_ratio, advantages, correction, mask, config)
    else:
        term, metrics = _clipped(ratio, advantages, mask, config)

    if config.off_policy_mask_threshold is not None:
        sampling = old if sampling_log_probs is None else sampling_log_probs
        threshold = config.off_policy_mask_threshold
        term = term * off_policy_mask(log_probs, sampling, advantages, mask, threshold)
    if entropy_mask is not None:
        term = term * entropy_mask
    if importance_sampling_ratio is not None:
        term = term * importance_sampling_ratio
    if config.beta and not config.use_kl_in_reward:
        if ref_log_probs is None:
            raise ValueError(f"beta={config.beta}: the KL term needs ref_log_probs")
        kl = kl_estimate(log_probs, ref_log_probs.where(mask, 0.0), config.kl_estimator)
        if config.use_bias_correction_kl:
            kl = kl * ratio
        term = term + config.beta * kl
        metrics["kl"] = mean_of(kl, mask)

    loss = (term * weights.to(log_probs.dtype)).sum()
    return loss, metrics | {"loss": loss.detach()}


def _clipped(
    ratio: Tensor, advantages: Tensor, mask: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped term (arXiv:1707.06347, equation 7), with a bound of its own above (DAPO,
    arXiv:2503.14476) and a cap where the advantage is negative (INTELLECT-2, arXiv:2505.07291)."""
    low = 1 - config.epsilon
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    capped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    term = -torch.min(capped * advantages, ratio.clamp(low, high) * advantages)
    clips_low = ((ratio < low) & (advantages < 0)).to(ratio.dtype)
    clips_high = ((ratio > high) & (advantages > 0)).to(ratio.dtype)
    metrics = {
        "clip_ratio/low_mean": mean_of(clips_low, mask),
        "clip_ratio/high_mean": mean_of(clips_high, mask),
        "clip_ratio/region_mean": mean_of(clips_low + clips_high, mask),
    }
    sampled = mask.any(1)
    if sampled.any():
        metrics["clip_ratio/low_min"] = _by_sequence(clips_low, mask)[sampled].min()
        metrics["clip_ratio/high_max"] = _by_sequence(clips_high, mask)[sampled].max()
    return term, metrics


def _by_sequence(values: Tensor, mask: Tensor) -> Tensor:
    return values.squeeze(1) if values.shape[1] == 1 else sequence_mean(values, mask).squeeze(1)


def _cispo(
    log_probs: Tensor, ratio: Tensor, advantages: Tensor, mask: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The ratio, capped, weighs a policy gradient (MiniMax-M1, arXiv:2506.13585; its cap alone, as
    in ScaleRL, arXiv:2510.13786)."""
    cap = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clips = ((ratio > cap) & (advantages > 0)).to(ratio.dtype)
    metrics = {"cispo_clip_ratio": mean_of(clips, mask)}
    return -ratio.clamp(max=cap).detach() * advantages * log_probs, metrics


def _sapo(ratio: Tensor, advantages: Tensor, config: ObjectiveConfig) -> Tensor:
    """A soft gate in place of the clip (SAPO, arXiv:2511.20347)."""
    positive, other = config.sapo_temperature_pos, config.sapo_temperature_neg
    temperature = torch.where(advantages > 0, positive, other).to(ratio.dtype)
    return -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


def _vespo(
    log_probs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    correction: Tensor | None,
    mask: Tensor,
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """phi(w) = exp(lambda (1 - w)) w^k weighs a policy gradient, w being the product of the
    sequence's ratios, and of its rollout corrections (VESPO, arXiv:2602.10693)."""
    limit, floor = LOG_RATIO_LIMIT, LOG_WEIGHT_FLOOR
    log_w = (log_ratio.detach().clamp(-limit, limit) * mask).sum(1, keepdim=True)
    if correction is not None:
        log_w = log_w + correction.log().clamp(floor, limit).sum(1, keepdim=True)
    log_w = log_w.clamp(floor, limit)
    good = advantages >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    rate = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg)
    phi = (rate + k * log_w - rate * log_w.exp()).exp().to(log_probs.dtype)
    return -phi * advantages * log_probs, {"vespo/phi_seq_mean": mean_of(phi, mask)}
