"""Sequences as tensors. Position t of every [sequences, tokens] tensor is about the prediction of
token t + 1: its mask, log-probability, weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Tensors with one row a sequence; "tokens" and "mask" [sequences, tokens] are always there."""


def pad_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], multiple: int = 1
) -> Batch:
    """Prompts and completions joined, padded on the right to a common length.

    Attention is causal and the padding comes last, so no token sees it.

    Args:
        multiple: the length is rounded up to it (sequence parallelism splits sequences).
    """
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    length = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, len(prompt) - 1 : end - 1] = 1
    return {"tokens": tokens, "mask": mask}


def align(values: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """Per-completion-token `values` laid out where `mask` is 1."""
    laid = torch.zeros_like(mask)
    laid[mask.bool()] = torch.tensor([v for row in values for v in row])
    return laid


def data_parallel_share(batch: Batch, rank: int, size: int) -> Batch:
    """The rows of data parallel rank `rank`."""
    rows = len(batch["tokens"]) // size
    return {name: tensor[rank * rows : (rank + 1) * rows] for name, tensor in batch.items()}


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """The batch in parts of `size` rows."""
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
