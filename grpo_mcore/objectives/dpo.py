"""Direct preference optimisation (arXiv:2305.18290, equation 7)."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_mcore.objectives.metrics import mean_of


def sequence_log_probs(log_probs: Tensor, mask: Tensor) -> Tensor:
    """[sequences]: the sum of each one's per-token log-probabilities [sequences, tokens]."""
    return log_probs.where(mask > 0, 0.0).sum(1)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    weights: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of the sigmoid loss, and its metrics under TRL's names, as
    `metrics.combine` wants them.

    Args:
        chosen_logps, ...: [pairs], of whole completions; the first two with gradient.
        weights: [pairs], 1 over the pairs of the whole update; 0 of one that does not count.
        label_smoothing: the probability that a pair is the wrong way round (conservative DPO,
            https://ericmitchell.ai/cdpo.pdf).
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    margin = chosen - rejected
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    per_pair = -(1 - label_smoothing) * right - label_smoothing * wrong
    loss = (per_pair * weights.to(per_pair.dtype)).sum()
    values = {
        "loss": per_pair,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "rewards/margins": margin,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    return loss, {name: mean_of(v[:, None], weights[:, None]) for name, v in values.items()}
