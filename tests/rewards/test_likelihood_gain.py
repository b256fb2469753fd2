"""The reward for raising the right answer's likelihood, from gains as a trainer measures them."""

import pytest

from grpo_mcore import GRPOConfig, GRPOTrainer, TeacherGRPOConfig
from grpo_mcore.config import ConfigError
from grpo_mcore.rewards import LikelihoodGainReward, as_reward_specs
from grpo_mcore.rewards.named import rewards_of

GAINS, TOKENS = [3.0, -6.0, None], [4, 2, 0]


@pytest.mark.parametrize(
    "settings, rewards",
    [
        ({}, [0.75, -3.0, None]),
        ({"gain_per_token": False}, [3.0, -6.0, None]),
        ({"gain_clip": 1.0}, [0.75, -1.0, None]),
        ({"gain_per_token": False, "gain_clip": 2.0}, [2.0, -2.0, None]),
    ],
    ids=str,
)
def test_the_formula(settings, rewards):
    config = TeacherGRPOConfig(rewards=["adaptive", "likelihood_gain"], **settings)
    _, named = rewards_of(config)
    for reward in (LikelihoodGainReward(**settings), named):
        found = reward(["p"] * 3, ["c"] * 3, likelihood_gains=GAINS, reference_tokens=TOKENS)
        assert found == rewards


def test_only_who_names_the_column_asks_for_it():
    def takes_all(prompts, completions, **columns): ...

    def names_it(completions, likelihood_gains): ...

    specs = as_reward_specs([LikelihoodGainReward(), takes_all, names_it])
    assert [spec.asks_for("likelihood_gains") for spec in specs] == [True, False, True]


def test_a_clip_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="gain_clip=0: must be above 0"):
        LikelihoodGainReward(gain_clip=0)


def test_its_settings_are_a_teachers_only(tmp_path):
    with pytest.raises(
        ConfigError, match=r"gain_clip=1\.0: is a setting of TeacherGRPOTrainer only"
    ):
        GRPOTrainer("model", args=GRPOConfig(output_dir=str(tmp_path), gain_clip=1.0))
