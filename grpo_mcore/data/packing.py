"""Several documents in one row of tokens."""

import bisect
from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins by best-fit decreasing: from the longest on, each into the bin it
    leaves the least space in (Ding et al. 2024, arXiv:2404.10830; TRL's "bfd").

    Args:
        lengths: of each item, 1 to `capacity`.

    Returns:
        The numbers of the items in each bin, in the order they were put there.
    """
    bins: list[list[int]] = []
    spaces: list[int] = []  # of the bins that have any, each size once, ascending
    with_space: dict[int, deque[list[int]]] = defaultdict(deque)
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        place = bisect.bisect_left(spaces, lengths[item])
        if place == len(spaces):
            space, chosen = capacity, []
            bins.append(chosen)
        else:
            space = spaces[place]
            chosen = with_space[space].popleft()
            if not with_space[space]:
                del spaces[place]
        chosen.append(item)
        left = space - lengths[item]
        if left:
            if not with_space[left]:
                bisect.insort(spaces, left)
            with_space[left].append(chosen)
    return bins


def number_documents(documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """int64 [rows, length], of each token the number of its document in its row; padding counts as
    a last document.

    Args:
        documents: lengths of each row's documents, in order; what is left is padding.
    """
    rows = []
    for lengths in documents:
        parts = torch.tensor([*lengths, length - sum(lengths)])
        rows.append(torch.repeat_interleave(torch.arange(len(parts)), parts))
    return torch.stack(rows)


def boundaries(documents: Tensor) -> Tensor:
    """int32 [documents + 1] positions where documents begin when the rows are laid end to end, and
    the end of the last. These are Transformer Engine's `cu_seqlens`.

    Args:
        documents: [rows, tokens] as of `number_documents`.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_tensor([documents.numel()])]).int()


def hidden_pairs(documents: Tensor) -> Tensor:
    """bool [rows, 1, tokens, tokens], true where a token (dim 2) may not attend to another (dim 3):
    a later one, or one of another document.

    As `attention_mask` it keeps documents apart in Megatron's own layers, except in layers with a
    sliding window, which put their window in its place. Transformer Engine's layers go by
    `boundaries` instead. Rotary positions go on over documents, which changes nothing, as attention
    depends on their differences alone.

    Args:
        documents: [rows, tokens] as of `number_documents`.
    """
    other = documents[:, :, None] != documents[:, None, :]
    later = torch.ones_like(other[0]).triu(1)
    return (other | later).unsqueeze(1)
