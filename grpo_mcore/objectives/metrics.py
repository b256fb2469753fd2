"""Metrics of parts of a batch, and of the whole from them.

A part's metric is a pair [sum, count], so that the whole's is a true mean however the batch was
split; a triple [sum, sum of squares, count], of which the whole's is an effective sample size; or a
single number: a share, to be added up, or an extreme, if its name ends in min or max.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """[sum, count] of `values`: over the mask's tokens if [sequences, tokens], over the sequences
    that have any if [sequences, 1]."""
    counted = mask > 0
    if values.shape[1] == 1:
        counted = counted.any(1, keepdim=True)
    return torch.stack([values.where(counted, 0.0).sum(), counted.sum().to(values.dtype)]).detach()


def effective_size_of(weights: Tensor, mask: Tensor) -> Tensor:
    """[sum, sum of squares, count] of the `weights` [sequences, tokens] of the mask's tokens. The
    whole's is Kish's effective sample size (Survey Sampling, 1965) as a share of the count,
    sum(w)^2 / (n sum(w^2)): 1 for equal weights, 1 / n where one outweighs all others; 0 for
    weights whose squares are too small for a number, NaN where they are too large."""
    counted = mask > 0
    held = weights.where(counted, 0.0)
    return torch.stack([held.sum(), held.square().sum(), counted.sum().to(weights.dtype)]).detach()


def combine(parts: Iterable[dict[str, list[float] | float]]) -> dict[str, float]:
    """The whole's metrics; a mean over nothing is 0, an extreme of what is not a number NaN."""
    gathered: dict[str, list] = {}
    for part in parts:
        for name, value in part.items():
            gathered.setdefault(name, []).append(value)
    return {name: _combine(name, values) for name, values in gathered.items()}


def _combine(name: str, values: list) -> float:
    if isinstance(values[0], list):
        total, *squares, count = map(sum, zip(*values, strict=True))
        if squares:
            # Python raises where a power, but not where a product, is too large.
            return total * total / (count * squares[0]) if squares[0] else 0.0
        return total / max(count, 1)
    for extreme in (min, max):
        if name.endswith(extreme.__name__):
            return math.nan if any(map(math.isnan, values)) else extreme(values)
    return sum(values)
