"""What each token weighs in the loss.

The weights of the tokens of all ranks and micro-batches of an update are normalised once, together;
a part's loss is its weighted sum, and the parts' losses add up to the whole one, however it was
split. So they are made of the mask of the whole update and then cut like it.
"""

import torch
from torch import Tensor

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.config.objective import LOSS_TYPES


def equal_weights(mask: Tensor, tokens: Tensor | float | None = None) -> Tensor:
    """Every token of `mask` weighs 1 over `tokens`, one number or each sequence's own; None: over
    their number."""
    mask = mask.double()
    total = mask.sum() if tokens is None else torch.as_tensor(tokens, dtype=mask.dtype)
    return mask / total.clamp(min=1).view(-1, 1)


def token_weights(
    mask: Tensor,
    loss_type: str,
    max_completion_length: int,
    tokens_per_update: Tensor | float | None = None,
) -> Tensor:
    """The weight of each token of an update, in float64.

    Args:
        mask: [sequences, tokens] of the whole update, 1 where a token was sampled.
        loss_type: says how per-token losses are averaged:
            "grpo", "sapo": sequences are the same, a sequence's tokens equal shares of it
            (arXiv:2402.03300, equation 3; arXiv:2511.20347);
            "dapo", "cispo", "vespo": all tokens are the same, 1 over `tokens_per_update`
            (arXiv:2503.14476);
            "bnpo": 1 over the tokens of this very update;
            "dr_grpo": 1 over sequences * max_completion_length (arXiv:2503.20783);
            "luspo": 1 over the sequences, so longer ones weigh more (arXiv:2602.05261).
        tokens_per_update: where a batch of samples serves several updates, the mean number of
            tokens of one of them, so that all its tokens weigh the same: one number, or
            [sequences]; None: those of `mask`.

    Raises:
        ConfigError: for an unknown loss type.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if loss_type in ("dapo", "cispo", "vespo"):
        return equal_weights(mask, tokens_per_update)
    if loss_type == "bnpo":
        return equal_weights(mask)
    mask = mask.double()
    if loss_type == "dr_grpo":
        return mask / (len(mask) * max_completion_length)
    if loss_type == "luspo":
        return mask / len(mask)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def mask_truncated(mask: Tensor, finished: Tensor) -> Tensor:
    """`mask` [sequences, tokens] without the sequences that are not `finished` [sequences]
    (arXiv:2503.14476, section 3.4). Where weights count sequences, these still do."""
    return mask * finished[:, None].to(mask.dtype)
