"""Batches for the tests of the loss, and the loss of a batch cut into parts."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.objectives.grpo import grpo_loss
from grpo_mcore.objectives.metrics import combine
from grpo_mcore.objectives.weights import token_weights

ROW, COLUMN = torch.meshgrid(
    torch.arange(4, dtype=torch.float64), torch.arange(6, dtype=torch.float64), indexing="ij"
)
LENGTH = 6
LOG_PROBS = -0.5 - 0.3 * ((3 * ROW + 5 * COLUMN) % 7)
OLD = LOG_PROBS - 0.1 * ((2 * ROW + 3 * COLUMN) % 5 - 2)
REFERENCE = LOG_PROBS + 0.08 * ((ROW + 2 * COLUMN) % 4 - 1.5)
ENTROPIES = 0.2 + 0.15 * ((5 * ROW + 2 * COLUMN) % 9)
SAMPLING = OLD + 0.02 * ((ROW * COLUMN) % 3 - 1)
ADVANTAGES = torch.tensor([1.2, -0.7, 0.1, -0.6], dtype=torch.float64)
MASK = torch.ones(4, LENGTH)
MASK[0, 4:] = 0
MASK[2, 2:] = 0

PLAIN = ObjectiveConfig(beta=0.0)


def configured(loss_type: str, **settings) -> ObjectiveConfig:
    """Settings without a KL term, unless given one; "cispo" has the cap it cannot do without."""
    if loss_type == "cispo":
        settings = {"epsilon_high": 5.0} | settings
    return replace(PLAIN, loss_type=loss_type, **settings)


def evaluate(
    config: ObjectiveConfig,
    log_probs: Tensor = LOG_PROBS,
    advantages: Tensor = ADVANTAGES,
    mask: Tensor = MASK,
    weights: Tensor | None = None,
    rows: list[Tensor] | None = None,
    **columns: Tensor,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, gradient, metrics) of a batch cut into `rows`; None: of all in one."""
    log_probs = log_probs.clone().requires_grad_()
    if weights is None:
        weights = token_weights(mask, config.loss_type, LENGTH)
    loss, parts = 0.0, []
    for part in [torch.arange(len(log_probs))] if rows is None else rows:
        share, metrics = grpo_loss(
            log_probs[part],
            advantages[part],
            weights[part],
            config,
            **{name: column[part] for name, column in columns.items()},
        )
        loss = loss + share
        parts.append({name: value.tolist() for name, value in metrics.items()})
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, combine(parts)
