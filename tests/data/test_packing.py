"""Best-fit decreasing packing, and what keeps packed documents apart."""

import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import pack_dataset

from grpo_mcore.data.packing import boundaries, hidden_pairs, number_documents, pack


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40), more=st.integers(0, 8))
def test_bins_are_those_of_trl(lengths, more):
    capacity = max(lengths) + more
    rows = Dataset.from_dict({"item": [[n] * length for n, length in enumerate(lengths)]})
    expected = pack_dataset(rows, capacity)["item"]
    found = pack(lengths, capacity)
    assert [[n for n in items for _ in range(lengths[n])] for items in found] == expected
    assert sorted(n for items in found for n in items) == list(range(len(lengths)))


def test_padding_counts_as_a_document():
    assert number_documents([[3, 2], [5, 2], []], 7).tolist() == [
        [0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0],
    ]  # fmt: skip


def test_boundaries_lay_rows_end_to_end():
    found = boundaries(number_documents([[3, 2], [7], [4, 1]], 7))
    assert found.tolist() == [0, 3, 5, 7, 14, 18, 19, 21]
    assert found.dtype == torch.int32


def test_no_token_attends_to_another_document_or_to_a_later_token():
    hidden = hidden_pairs(number_documents([[2, 1], [4]], 4))
    assert hidden.shape == (2, 1, 4, 4) and hidden.dtype == torch.bool
    seen = (~hidden).int().squeeze(1).tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
