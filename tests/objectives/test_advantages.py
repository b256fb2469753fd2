"""Advantages against values computed once with TRL 1.16, and the formula by hand."""

import math
import statistics

import pytest
import torch

from grpo_mcore.errors import ConfigError
from grpo_mcore.objectives.advantages import (
    EPSILON,
    compute_advantages,
    group_advantages,
    groups_without_spread,
    sum_rewards,
)


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
@pytest.mark.parametrize("estimator", ["group", "loo"])
@pytest.mark.parametrize("num_generations", [2, 3, 4, 7, 11])
def test_equal_rewards_teach_nothing(scale, estimator, num_generations):
    rewards = torch.linspace(-2, 2, 500).repeat_interleave(num_generations)
    found = group_advantages(rewards, num_generations, scale, estimator)
    assert found.dtype == rewards.dtype and found.abs().max() < 1e-9


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    rewards = torch.tensor([0.3, 1.0, -2.0, 5.0, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    sums = group_advantages(rewards, 4, scale).view(2, 4).sum(1)
    assert sums.tolist() == pytest.approx([0, 0], abs=1e-12)


def leave_one_out(group: list[float], place: int) -> float:
    """By hand: over the deviation of the others, unless they are all the same."""
    others = group[:place] + group[place + 1 :]
    deviation = statistics.stdev(others) if len(others) > 1 else 0.0
    centred = group[place] - statistics.mean(others)
    return centred / (deviation + 1e-6) if deviation > 1e-4 else centred


@pytest.mark.seed(58, 59)
@pytest.mark.parametrize(
    "group", [[1.0, 0, 1, 0], [0.3, 1.0, -2.0, 5.0, 0.1], [0.35] * 7 + [0.0], [2.0, 1.0]]
)
def test_leave_one_out_is_nemo_rls(group):
    rewards = torch.tensor(group * 2, dtype=torch.float64)
    found = group_advantages(rewards, len(group), advantage_estimator="loo")
    expected = [leave_one_out(group, place) for place in range(len(group))] * 2
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.seed(59)
def test_leave_one_out_of_halves():
    rewards = torch.tensor([1.0, 0, 1, 0], dtype=torch.float64)
    found = group_advantages(rewards, 4, "group", "loo")
    assert found.tolist() == pytest.approx([1.1547, -1.1547, 1.1547, -1.1547], abs=1e-4)
    found = group_advantages(rewards, 4, "none", "loo")
    assert found.tolist() == pytest.approx([2 / 3, -2 / 3, 2 / 3, -2 / 3])


@pytest.mark.seed(41)
@pytest.mark.parametrize("estimator", ["group", "loo"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_missing_rewards_are_as_if_never_sampled(estimator, scale):
    given = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64)
    missing = torch.tensor([math.nan, 0.3, 1.0, math.nan, -2.0], dtype=torch.float64)
    found = group_advantages(missing, 5, scale, estimator)
    assert found[[0, 3]].tolist() == [0, 0]
    expected = group_advantages(given, 3, scale, estimator)
    torch.testing.assert_close(found[[1, 2, 4]], expected)


@pytest.mark.parametrize("estimator", ["group", "loo"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_groups_with_one_reward_or_none(estimator, scale, aggregation):
    rewards = torch.full((6, 2), math.nan, dtype=torch.float64)
    rewards[1] = 3.0
    settings = {"scale_rewards": scale, "advantage_estimator": estimator}
    found = compute_advantages(rewards, 3, multi_objective_aggregation=aggregation, **settings)
    assert found.count_nonzero() == 0 and found.isfinite().all()


def test_each_reward_counts_the_same_once_normalised():
    """The scale of a reward is lost in "normalize_then_sum", its weight is not."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    scaled = rewards * torch.tensor([1.0, 1000.0])
    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    found = compute_advantages(rewards, 4, **settings)
    torch.testing.assert_close(found, compute_advantages(scaled, 4, **settings), rtol=0, atol=1e-3)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.std().item() == pytest.approx(1, abs=1e-3)
    weighted = compute_advantages(rewards, 4, reward_weights=[1.0, 0.0], **settings)
    torch.testing.assert_close(weighted, compute_advantages(rewards[:, :1], 4, **settings))


@pytest.mark.seed(41, 77)
def test_weighted_sum_of_what_was_given():
    rewards = torch.tensor([[1.0, 2.0], [math.nan, 3.0], [math.nan, math.nan]])
    found = sum_rewards(rewards, [2.0, -1.0])
    assert found[:2].tolist() == [0, -3] and found[2].isnan()


def test_groups_that_teach_nothing():
    nan = math.nan
    rewards = torch.tensor([1, 1, 1, 0, 1, 1, nan, 1, 1, nan, nan, 5, nan, nan, nan, nan, 0, 1])
    found = groups_without_spread(rewards, 3)
    assert found.tolist() == [True, False, True, True, True, False]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scale_rewards": "rank"}, "scale_rewards=rank: choose one of group, batch, none"),
        ({"advantage_estimator": "gae"}, "advantage_estimator=gae: choose one of group, loo"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation=sum: choose one of"),
        ({"reward_weights": [1.0]}, "reward_weights=.1.0.: needs one weight for each of 2 reward"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "penalties": torch.zeros(4)},
            "multi_objective_aggregation=normalize_then_sum: takes no KL",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        compute_advantages(torch.zeros(4, 2), 2, **settings)
