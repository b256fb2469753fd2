"""Aliases stand beside TRL's names of metrics."""

import pytest

from grpo_mcore.report.names import with_aliases


@pytest.mark.seed(66, 79)
def test_aliases_of_atlas_and_nemo_rl():
    metrics = {"reward": 1.0, "kl": 0.5, "completions/mean_length": 7.0, "loss": 2.0}
    assert with_aliases(metrics) == metrics | {
        "rewards/mean": 1.0,
        "mean_reward": 1.0,
        "kl_divergence": 0.5,
        "completion_length": 7.0,
    }
    assert list(with_aliases(metrics))[:4] == list(metrics)


def test_one_functions_mean_and_the_mean_of_all_stay_apart():
    metrics = {"rewards/format/mean": 0.1, "rewards/mean/mean": 0.2, "reward": 0.3}
    assert with_aliases(metrics) == metrics | {
        "rewards/format": 0.1, "rewards/mean": 0.3, "mean_reward": 0.3,
    }  # fmt: skip


def test_what_is_there_stays_and_nothing_comes_from_an_alias():
    metrics = {"kl": 0.5, "kl_divergence": 0.25, "rewards/chosen": 1.0}
    assert with_aliases(metrics) == metrics
    assert with_aliases({"rewards/mean": 0.5}) == {"rewards/mean": 0.5}


def test_evaluations_have_them_too_and_the_argument_is_left_alone():
    metrics = {"eval_reward": 1.0, "eval_rewards/format/mean": 0.5}
    assert with_aliases(metrics) == {
        "eval_reward": 1.0,
        "eval_rewards/format/mean": 0.5,
        "eval_rewards/mean": 1.0,
        "eval_mean_reward": 1.0,
        "eval_rewards/format": 0.5,
    }
    assert len(metrics) == 2
