"""Sequences as tensors. Position t of every [sequences, tokens] tensor is about the prediction of
token t + 1: its mask, log-probability, weight.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_mcore.parallel.groups import Role

Batch = dict[str, Tensor]
"""Tensors [sequences] or [sequences, tokens]; "tokens" and "mask" [sequences, tokens] are always
there. "lengths" [sequences]: what is left of each row when the padding at its end is cut off.
"documents" [sequences, tokens] (`data.packing.number_documents`): tokens attend only within their
document."""
OF_LAST_STAGE = ("reference", "old")
"""Entries that only the last pipeline stage has; zeros on others."""


def pad_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], multiple: int = 1
) -> Batch:
    """Prompts and completions joined, padded on the right to a common length.

    Attention is causal and the padding comes last, so no token sees it.

    Args:
        multiple: the length is rounded up to it (sequence parallelism splits sequences).
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    length = -(-max(lengths) // multiple) * multiple
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([*prompt, *completion])
        mask[row, len(prompt) - 1 : end - 1] = 1
    return {"tokens": tokens, "mask": mask, "lengths": torch.tensor(lengths)}


def align(values: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    """Per-completion-token `values` laid out where `mask` is 1."""
    laid = torch.zeros_like(mask)
    laid[mask.bool()] = torch.tensor([v for row in values for v in row], dtype=mask.dtype)
    return laid


def everywhere(batch: Batch, role: Role) -> Batch:
    """The batch with what only the last pipeline stage has on every rank."""
    whole = dict(batch)
    for name in OF_LAST_STAGE:
        if name in batch:
            whole[name] = batch[name].clone()
            dist.all_reduce(whole[name], group=role.groups.pp)
    return whole
