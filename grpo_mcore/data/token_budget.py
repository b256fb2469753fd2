"""Micro-batches of a token budget, balanced over data parallel ranks."""

from collections.abc import Sequence


def deal_rows(
    lengths: Sequence[int],
    ranks: int,
    max_tokens: int,
    count_multiple: int = 1,
    length_multiple: int = 1,
) -> list[list[list[int]]]:
    """Deals sequences to ranks in micro-batches of sequences of similar length.

    A micro-batch costs its padded tokens: its sequences times the longest of them. There are as few
    as `max_tokens` and the multiples allow, and the costliest is as cheap as so many can make it.
    The n-th micro-batches of all ranks are alike, the costliest come first, and the sums of any two
    ranks differ by at most as much as two n-th micro-batches do, for the worst n.

    Args:
        lengths: tokens of each sequence.
        max_tokens: the most a micro-batch may cost. It is exceeded only by a sequence that is
            longer, or where so many micro-batches as it asks for would leave some empty.
        count_multiple: what the number of a rank's micro-batches must divide by: with a virtual
            pipeline, the pipeline size.
        length_multiple: what padded lengths are rounded up to.

    Returns:
        For each rank its micro-batches, as the numbers of their sequences: every sequence once, no
        micro-batch empty, so many on every rank.

    Raises:
        ValueError: when the sequences are fewer than `ranks` times `count_multiple`.
    """
    unit = ranks * count_multiple
    if len(lengths) < unit:
        raise ValueError(
            f"{len(lengths)} sequences are too few for {unit} micro-batches: {ranks} data parallel "
            f"ranks with a multiple of {count_multiple} each"
        )
    padded = [-(-length // length_multiple) * length_multiple for length in lengths]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    needed = len(_fill(order, padded, max_tokens))
    count = min(-(-needed // unit), len(order) // unit) * unit
    parts = _fill(order, padded, _least_budget(order, padded, count))

    def cost(part: list[int]) -> int:
        return len(part) * padded[part[0]]

    while len(parts) < count:
        largest = max((part for part in parts if len(part) > 1), key=cost)
        half = len(largest) // 2
        parts.remove(largest)
        parts += [largest[:half], largest[half:]]
    parts.sort(key=cost, reverse=True)

    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for first in range(0, count, ranks):
        # The largest to the rank that has least so far: the spread of the loads then never exceeds
        # the greatest spread of costs within one round.
        for rank, part in zip(
            sorted(range(ranks), key=loads.__getitem__), parts[first : first + ranks], strict=True
        ):
            dealt[rank].append(part)
            loads[rank] += cost(part)
    return dealt


def _fill(order: list[int], padded: list[int], budget: int) -> list[list[int]]:
    """Cuts `order`, rows from the longest to the shortest, into runs that cost at most `budget`,
    or are a single row."""
    parts: list[list[int]] = []
    for row in order:
        if parts and (len(parts[-1]) + 1) * padded[parts[-1][0]] <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _least_budget(order: list[int], padded: list[int], count: int) -> int:
    """The least budget that needs no more than `count` runs."""
    low, high = 1, len(order) * padded[order[0]]
    while low < high:
        middle = (low + high) // 2
        if len(_fill(order, padded, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return low
