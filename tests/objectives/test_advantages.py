"""Advantages against values computed once with TRL 1.16, and the formula by hand."""

import statistics

import pytest
import torch

from grpo_mcore.objectives.advantages import EPSILON, group_advantages


@pytest.mark.parametrize(
    "rewards, scale, expected",
    [
        ([1.2, 0.5, 1.0, 0.1], "group", [1.006532, -0.402613, 0.603919, -1.207838]),
        ([1.1, 0.25, 1.0, 0.05], "group", [0.947557, -0.663289, 0.758045, -1.042312]),
        ([1.2, 0.5, 1.0, 0.1], "none", [0.5, -0.2, 0.3, -0.6]),
    ],
)
def test_advantages_are_trls(rewards, scale, expected):
    found = group_advantages(torch.tensor(rewards, dtype=torch.float64), 4, scale)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_batch_scale_uses_one_deviation_for_all_groups():
    rewards = [1.0, 0.0, 0.5, 3.0, 2.5, 4.0]
    deviation = statistics.stdev(rewards) + EPSILON
    means = [0.5] * 3 + [19 / 6] * 3
    expected = [(r - mean) / deviation for r, mean in zip(rewards, means, strict=True)]
    assert group_advantages(torch.tensor(rewards), 3, "batch").tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("num_generations", [2, 3, 4, 7, 11])
def test_equal_rewards_teach_nothing(scale, num_generations):
    rewards = torch.linspace(-2, 2, 500).repeat_interleave(num_generations)
    found = group_advantages(rewards, num_generations, scale)
    assert found.dtype == rewards.dtype and found.abs().max() < 1e-9


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    rewards = torch.tensor([0.3, 1.0, -2.0, 5.0, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    sums = group_advantages(rewards, 4, scale).view(2, 4).sum(1)
    assert sums.tolist() == pytest.approx([0, 0], abs=1e-12)


def test_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale_rewards=rank: choose one of group, batch, none"):
        group_advantages(torch.zeros(4), 2, "rank")
