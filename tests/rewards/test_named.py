"""Rewards that a configuration names."""

from pathlib import Path

import pytest

from grpo_mcore import TeacherGRPOConfig
from grpo_mcore.config import ConfigError
from grpo_mcore.rewards import AdaptiveTeachingReward, accuracy_reward
from grpo_mcore.rewards.named import rewards_of


def test_adaptive_is_the_default_with_the_settings_of_the_configuration():
    (adaptive,) = rewards_of(TeacherGRPOConfig(efficiency_weight=0.5))
    assert isinstance(adaptive, AdaptiveTeachingReward)
    assert adaptive.efficiency_weight == 0.5


def test_functions_are_imported_also_from_where_the_job_was_started(tmp_path: Path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def half(completions):\n    return [0.5]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    named = ["my_rewards:half", "grpo_mcore.rewards:accuracy_reward"]
    half, accuracy = rewards_of(TeacherGRPOConfig(rewards=named))
    assert half(["a"]) == [0.5]
    assert accuracy is accuracy_reward


@pytest.mark.parametrize("name", ["adaptiv", "nowhere:half", "grpo_mcore.rewards:half", ":half"])
def test_names_of_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=f"rewards={name}: "):
        rewards_of(TeacherGRPOConfig(rewards=[name]))
    with pytest.raises(ConfigError, match="rewards=\\[\\]: name at least one of adaptive"):
        rewards_of(TeacherGRPOConfig(rewards=[]))
