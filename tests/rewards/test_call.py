"""A reward function that cannot be trained on is named, with the step."""

import math

import numpy
import pytest
import torch

from grpo_mcore.rewards import AdaptiveTeachingReward, RewardError, call_rewards

PROMPTS, COMPLETIONS = ["p", "q"], ["a", "bb"]


def call(function):
    return call_rewards(function, 7, PROMPTS, COMPLETIONS, {"answers": ["1", "2"]})


def test_function_gets_prompts_completions_and_columns():
    def length_and_answer(prompts, completions, answers, **kwargs):
        assert prompts == PROMPTS and kwargs == {}
        return [len(c) + int(a) for c, a in zip(completions, answers, strict=True)]

    assert call(length_and_answer) == [2.0, 4.0]
    assert all(isinstance(reward, float) for reward in call(length_and_answer))


def test_a_column_may_have_any_name():
    found = call_rewards(lambda step, **_: step, 7, PROMPTS, COMPLETIONS, {"step": [0.5, 2.0]})
    assert found == [0.5, 2.0]


@pytest.mark.parametrize(
    "rewards",
    [(0, 1), numpy.array([0.0, 1.0]), torch.tensor([0.0, 1.0]), list(numpy.float32([0, 1]))],
    ids=["tuple", "array", "tensor", "numpy floats"],
)
def test_any_kind_of_number_will_do(rewards):
    found = call(lambda **_: rewards)
    assert found == [0.0, 1.0] and {type(reward) for reward in found} == {float}


def raising(**_):
    raise ZeroDivisionError("no tokens")


def nothing(**_):
    return None


def too_few(**_):
    return [1.0]


def not_a_number(**_):
    return [1.0, math.nan]


def endless(**_):
    return [math.inf, 1.0]


def none_for_one(**_):
    return [None, 1.0]


def words(**_):
    return [1.0, "1.0"]


@pytest.mark.parametrize(
    "function, reason",
    [
        (raising, "ZeroDivisionError: no tokens"),
        (nothing, "returned a NoneType"),
        (too_few, "returned 1 values for 2 completions"),
        (not_a_number, "returned nan (float) for completion 1"),
        (endless, "returned inf (float) for completion 0"),
        (none_for_one, "returned None (NoneType) for completion 0"),
        (words, "returned '1.0' (str) for completion 1"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_trained_on_is_refused(function, reason):
    with pytest.raises(RewardError) as caught:
        call(function)
    message = str(caught.value)
    assert f"reward function {function.__name__} " in message
    assert reason in message and "step 7" in message


def test_reward_objects_are_named_by_their_class():
    with pytest.raises(RewardError, match="function AdaptiveTeachingReward failed at step 7"):
        call(AdaptiveTeachingReward())
