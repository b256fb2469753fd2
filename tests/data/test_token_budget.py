"""Micro-batches of a token budget: nothing lost, alike on every rank, the budget kept."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mcore.data.token_budget import deal_rows

CASES = st.tuples(
    st.lists(st.integers(1, 200), min_size=1, max_size=80),
    st.integers(1, 4),  # ranks
    st.integers(1, 3),  # count_multiple
    st.integers(1, 600),  # max_tokens
    st.sampled_from([1, 8]),  # length_multiple
).filter(lambda case: len(case[0]) >= case[1] * case[2])


def cost(part, lengths, multiple=1):
    return len(part) * -(-max(lengths[row] for row in part) // multiple) * multiple


@given(CASES)
def test_every_sequence_once_in_as_many_micro_batches_on_every_rank(case):
    lengths, ranks, count_multiple, max_tokens, multiple = case
    dealt = deal_rows(lengths, ranks, max_tokens, count_multiple, multiple)
    assert len(dealt) == ranks
    assert sorted(row for parts in dealt for part in parts for row in part) == [
        *range(len(lengths))
    ]
    (count,) = {len(parts) for parts in dealt}
    assert count % count_multiple == 0
    assert all(part for parts in dealt for part in parts)
    assert deal_rows(lengths, ranks, max_tokens, count_multiple, multiple) == dealt


@given(CASES)
def test_the_budget_is_kept_where_it_can_be(case):
    lengths, ranks, count_multiple, max_tokens, multiple = case
    dealt = deal_rows(lengths, ranks, max_tokens, count_multiple, multiple)
    over = [
        part
        for parts in dealt
        for part in parts
        if len(part) > 1 and cost(part, lengths, multiple) > max_tokens
    ]
    unit = ranks * count_multiple
    # One more round of micro-batches would have left some empty.
    assert not over or unit * (len(dealt[0]) // count_multiple + 1) > len(lengths)


@given(CASES)
def test_there_are_no_more_micro_batches_than_the_budget_asks_for(case):
    lengths, ranks, count_multiple, max_tokens, multiple = case
    count = len(deal_rows(lengths, ranks, max_tokens, count_multiple, multiple)[0])
    if count > count_multiple:
        fewer = (count - count_multiple) * ranks
        # Sequences sorted by length and cut anywhere in `fewer` runs: some run breaks the budget.
        rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        runs = 0
        while rows:
            size = len(rows)
            while size > 1 and cost(rows[:size], lengths, multiple) > max_tokens:
                size -= 1
            rows, runs = rows[size:], runs + 1
        assert runs > fewer


@given(CASES)
def test_ranks_are_balanced(case):
    lengths, ranks, count_multiple, max_tokens, multiple = case
    dealt = deal_rows(lengths, ranks, max_tokens, count_multiple, multiple)
    costs = [[cost(part, lengths, multiple) for part in parts] for parts in dealt]
    rounds = list(zip(*costs, strict=True))
    loads = [sum(parts) for parts in costs]
    assert max(loads) - min(loads) <= max(max(r) - min(r) for r in rounds)
    assert all(min(a) >= max(b) for a, b in pairwise(rounds))


def test_similar_lengths_share_a_micro_batch():
    lengths = [100, 10, 12, 90, 11, 95, 9, 105]
    dealt = deal_rows(lengths, 2, 420)
    assert [sorted(part) for parts in dealt for part in parts] == [[0, 3, 5, 7], [1, 2, 4, 6]]
    assert sum(cost(part, lengths) for parts in dealt for part in parts) == 4 * 105 + 4 * 12


def test_lengths_alike_are_dealt_evenly():
    dealt = deal_rows([64] * 32, 4, 256)
    assert [[len(part) for part in parts] for parts in dealt] == [[4, 4]] * 4


def test_the_budget_counts_lengths_as_they_are_padded():
    assert len(deal_rows([9] * 4, 1, 36)[0]) == 1
    assert len(deal_rows([9] * 4, 1, 36, length_multiple=8)[0]) == 2


def test_less_padding_than_in_the_order_they_came():
    lengths = [(37 * n) % 256 + 1 for n in range(128)]
    dealt = deal_rows(lengths, 2, 2048)
    padded = sum(cost(part, lengths) for parts in dealt for part in parts)
    given_order = sum(cost(range(n, n + 8), lengths) for n in range(0, 128, 8))
    assert padded < 1.15 * sum(lengths) < 1.5 * sum(lengths) < given_order


def test_too_few_sequences():
    with pytest.raises(ValueError, match="3 sequences are too few for 4 micro-batches"):
        deal_rows([5, 5, 5], 2, 100, count_multiple=2)
