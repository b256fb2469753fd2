"""Correction for rollouts sampled by an engine whose probabilities are not quite the trainer's.

Each token, or sequence, is weighed by p_trainer / p_engine before the update (Yao et al. 2025,
"Your efficient RL framework secretly brings you off-policy RL training"), kept in bounds.

Under top-p, top-k or min-p the engine's log-probabilities are those of what it kept, renormalised,
and the plain ratio carries the kept mass as a factor (huggingface/trl issue 6789), which is nothing
the policy did. The trainer's have to be renormalised alike, by `kept_log_mass`; a trainer that does
not calls `refuse_truncated_sampling`.
"""

import math

import torch
from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import CORRECTION_MODES, ObjectiveConfig
from grpo_mcore.errors import ConfigError
from grpo_mcore.objectives.metrics import mean_of


def rollout_correction(
    old_log_probs: Tensor,
    sampling_log_probs: Tensor,
    mask: Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """What each token's policy term is multiplied by.

    Args:
        old_log_probs: [sequences, tokens], the trainer's before the update, without gradient.
        sampling_log_probs: [sequences, tokens], the engine's; NaN where it could not tell, which
            counts as no difference.
        mask: [sequences, tokens].
        mode: "token_..." for a ratio a token, "sequence_..." for their product over the sequence;
            "..._truncate" brings ratios into the bounds, "..._mask" sets those outside to 0.

    Returns:
        [sequences, tokens], 1 where masked, or [sequences, 1].

    Raises:
        ConfigError: for an unknown mode.
    """
    check_choice("vllm_importance_sampling_mode", mode, CORRECTION_MODES)
    level, bound = mode.split("_")
    gap = _gap(old_log_probs, sampling_log_probs, mask)
    ratio = (gap.sum(1, keepdim=True) if level == "sequence" else gap).exp()
    low = -torch.inf if clip_min is None else clip_min
    high = torch.inf if clip_max is None else clip_max
    bounded = ratio.clamp(low, high)
    return bounded if bound == "truncate" else ratio.where(ratio == bounded, 0.0)


def correction_metrics(
    ratio: Tensor, old_log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Metrics of a part, under TRL's names less "sampling/", of what `rollout_correction` was given
    and returned; none for a part without tokens."""
    known = (mask > 0) & ~sampling_log_probs.isnan()
    gap = _gap(old_log_probs, sampling_log_probs, mask).abs()
    counted = mask > 0
    ratios = ratio[counted if ratio.shape == mask.shape else counted.any(1)]
    if not len(ratios):
        return {}
    return {
        "sampling_logp_difference/mean": mean_of(gap, known),
        "sampling_logp_difference/max": gap.max(),
        "importance_sampling_ratio/min": ratios.min(),
        "importance_sampling_ratio/mean": mean_of(ratio, mask),
        "importance_sampling_ratio/max": ratios.max(),
    }


def _gap(old_log_probs: Tensor, sampling_log_probs: Tensor, mask: Tensor) -> Tensor:
    """log p_trainer - log p_engine, 0 where masked or not known."""
    return (old_log_probs - sampling_log_probs).where((mask > 0) & ~sampling_log_probs.isnan(), 0.0)


def kept_log_mass(
    logits: Tensor,
    targets: Tensor,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
) -> Tensor:
    """The log of the probability of the tokens that the engine's truncation keeps.

    A log-probability less this is the truncated distribution's: the trainer's own then compare with
    the engine's, and a ratio has mean 1. What is kept is worked out anew from the trainer's logits
    (arXiv:2512.02556, section 3.1, has the engine tell it), so where the two differ on a token at
    the margin, its probability remains as an error; the sampled token is always kept.

    Args:
        logits: [..., vocabulary] over the temperature.
        targets: [...], the sampled tokens.
        top_p, top_k, min_p: as given to vLLM, and applied in its order: min_p, top_k, top_p.

    Returns:
        [...], in nats, at most 0; gradients flow to the logits.
    """
    log_probs = logits.log_softmax(-1)
    kept = log_probs.detach()
    if min_p > 0:
        least = kept.amax(-1, keepdim=True) + math.log(min_p)
        kept = kept.masked_fill(kept < least, -torch.inf)
    if 0 < top_k < kept.shape[-1]:
        least = kept.topk(top_k).values[..., -1:]
        kept = kept.masked_fill(kept < least, -torch.inf)
    if top_p < 1:
        ascending, order = kept.softmax(-1).sort(-1)
        dropped = ascending.cumsum(-1) <= 1 - top_p
        kept = kept.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    kept = kept.isfinite().scatter(-1, targets[..., None], True)
    return log_probs.masked_fill(~kept, -torch.inf).logsumexp(-1)


def refuse_truncated_sampling(
    config: ObjectiveConfig, top_p: float, top_k: int, min_p: float | None
) -> None:
    """Raises ConfigError where the correction would be biased by how tokens are sampled; for
    trainers that do not renormalise by `kept_log_mass`."""
    if not config.vllm_importance_sampling_correction:
        return
    for key, value, plain in (("top_p", top_p, 1.0), ("top_k", top_k, 0), ("min_p", min_p, 0.0)):
        if value not in (plain, None):
            raise ConfigError(
                f"{key}={value}: the engine's log-probabilities are then those of the tokens it "
                "keeps, the trainer's of all, and vllm_importance_sampling_correction would scale "
                f"the loss by the mass kept; set {key}={plain}, or "
                "vllm_importance_sampling_correction=False"
            )
