"""Metrics of the whole from those of its parts."""

import math

import pytest
import torch

from grpo_mcore.objectives.metrics import combine, effective_size_of, mean_of


def test_means_shares_and_extremes():
    parts = [
        {"kl": [1.0, 4.0], "loss": 0.25, "clip/low_min": 0.5, "gap/max": 1.0},
        {"kl": [2.0, 1.0], "loss": 0.5, "gap/max": 3.0},
        {"kl": [0.0, 0.0], "loss": 0.0, "clip/low_min": 0.2},
    ]
    expected = {"kl": 3 / 5, "loss": 0.75, "clip/low_min": 0.2, "gap/max": 3.0}
    assert combine(parts) == pytest.approx(expected)


def test_mean_over_nothing_is_0():
    assert combine([{"kl": [0.0, 0.0]}]) == {"kl": 0.0}
    assert combine([]) == {}


def test_mean_of_tokens_and_of_sequences():
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    tokens = torch.tensor([[1.0, 2, torch.nan], [3, torch.nan, 0], [torch.nan, 0, 0]])
    assert mean_of(tokens, mask).tolist() == [6, 3]
    sequences = torch.tensor([[4.0], [5.0], [torch.nan]])
    assert mean_of(sequences, mask).tolist() == [9, 2]


def test_effective_size_of_weights_from_parts():
    weights = torch.tensor([[1.0, 2, 9], [3, torch.nan, 9]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    parts = [effective_size_of(w[None], m[None]) for w, m in zip(weights, mask, strict=True)]
    expected = 6**2 / (3 * (1 + 4 + 9))
    assert combine([{"ess": part.tolist()} for part in parts])["ess"] == pytest.approx(expected)
    assert combine([{"ess": [0.0, 0.0, 0.0]}]) == {"ess": 0.0}


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.nan, 1.0], [0.5, math.nan, 1.0]])
def test_extremes_of_what_is_not_a_number(values):
    for name in ("gap/max", "clip/low_min"):
        assert math.isnan(combine([{name: value} for value in values])[name])


@pytest.mark.parametrize(
    "weight, expected", [(0.0, 0.0), (1e-200, 0.0), (1e200, math.nan), (math.inf, math.nan)]
)
def test_effective_size_of_weights_beyond_what_numbers_hold(weight, expected):
    weights = torch.full((1, 3), weight, dtype=torch.float64)
    found = combine([{"ess": effective_size_of(weights, torch.ones(1, 3)).tolist()}])["ess"]
    assert found == pytest.approx(expected, nan_ok=True)
