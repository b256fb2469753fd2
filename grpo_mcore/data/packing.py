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


def document_positions(documents: Sequence[int], length: int) -> Tensor:
    """[length] positions that start from 0 in each document and in the padding after the last.

    Args:
        documents: lengths of the documents of one row, in order.
    """
    parts = [*documents, length - sum(documents)]
    return torch.cat([torch.arange(part) for part in parts])


def hidden_pairs(documents: Sequence[Sequence[int]], length: int) -> Tensor:
    """[rows, 1, length, length], true where a token (dim 2) may not attend to another (dim 3): one
    after it, or of another document. This is Megatron's explicit `attention_mask`.

    Args:
        documents: lengths of the documents of each row, in order; what is left is padding.
    """
    number = torch.zeros(len(documents), length, dtype=torch.long)
    for row, lengths in enumerate(documents):
        parts = torch.tensor([*lengths, length - sum(lengths)])
        number[row] = torch.repeat_interleave(torch.arange(len(parts)), parts)
    other = number[:, :, None] != number[:, None, :]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (other | later).unsqueeze(1)
