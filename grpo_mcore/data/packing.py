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


def boundaries(documents: Sequence[int], length: int) -> Tensor:
    """int32 [documents + 1] positions where the documents of a row of `length` tokens begin, and
    its end; padding counts as a last document. These are Transformer Engine's `cu_seqlens`.

    Args:
        documents: lengths of the row's documents, in order.
    """
    ends = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends if ends[-1] == length else torch.cat([ends, ends.new_tensor([length])])


def hidden_pairs(documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """bool [rows, 1, length, length], true where a token (dim 2) may not attend to another (dim 3):
    a later one, or one of another document.

    As `attention_mask` it keeps documents apart in Megatron's own layers, except in layers with a
    sliding window, which put their window in its place. Transformer Engine's layers go by
    `boundaries` instead. Rotary positions go on over documents, which changes nothing, as attention
    depends on their differences alone.

    Args:
        documents: lengths of each row's documents, in order; what is left is padding.
    """
    number = torch.zeros(len(documents), length, dtype=torch.long)
    for row, lengths in enumerate(documents):
        parts = torch.tensor([*lengths, length - sum(lengths)])
        number[row] = torch.repeat_interleave(torch.arange(len(parts)), parts)
    other = number[:, :, None] != number[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (other | later).unsqueeze(1)
