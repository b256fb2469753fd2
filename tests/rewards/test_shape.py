"""Rewards for format and length; tests/rewards/test_trl.py compares them with TRL's."""

import pytest

from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards import (
    format_reward,
    get_length_penalty,
    get_soft_overlong_punishment,
)


def test_thinking_comes_first_and_once():
    texts = ["<think>a\nb</think>c", "<think>a", "a<think>b</think>", "<think><think></think>"]
    assert format_reward(texts) == [1.0, 0.0, 0.0, 0.0]
    assert format_reward([[{"role": "assistant", "content": text}] for text in texts]) == [
        1,
        0,
        0,
        0,
    ]


def test_punishment_sets_in_where_the_cache_begins():
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    ids = [[0] * length for length in (0, 80, 90, 100, 101)]
    assert punish(completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_penalty_grows_with_every_token():
    penalise = get_length_penalty(4)
    assert penalise(completion_ids=[[0] * n for n in range(6)]) == [0, -0.25, -0.5, -0.75, -1, -1]


@pytest.mark.parametrize("cache", [-1, 101])
def test_a_cache_that_does_not_fit_is_refused(cache):
    with pytest.raises(ConfigError, match=f"soft_punish_cache={cache}: must be from 0 to "):
        get_soft_overlong_punishment(100, cache)


def test_a_length_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="max_completion_len=0: must be at least 1"):
        get_length_penalty(0)
