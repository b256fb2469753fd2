"""The supervised loss: mean negative log-likelihood of the completion tokens."""

from torch import Tensor


def sft_loss(log_probs: Tensor, weights: Tensor) -> Tensor:
    """This part's share of the loss; `weights` [sequences, tokens] sum to 1 over all parts."""
    return -(log_probs * weights.to(log_probs.dtype)).sum()
