"""Answers are compared as mathematics, and none takes for ever."""

import time

import pytest

from grpo_mcore.rewards import RewardCall, accuracy, accuracy_reward, as_reward_specs, score


@pytest.mark.seed(55)
def test_equal_is_right_and_what_cannot_be_judged_is_left_out():
    completions = [r"It is \boxed{\frac{2}{6}}.", r"\boxed{0.3}", "a third", r"\boxed{1}"]
    solution = [r"$\frac{1}{3}$", r"$\frac{1}{3}$", r"$\frac{1}{3}$", ""]
    assert accuracy_reward(completions, solution) == [1.0, 0.0, 0.0, None]


def test_what_was_read_is_logged():
    call = RewardCall(
        1,
        ["?"] * 3,
        [r"\boxed{2}", "none", r"\boxed{2}"],
        [[0]] * 3,
        {"solution": ["$2$", "$2$", ""]},
    )
    extra = score(as_reward_specs(accuracy_reward, columns=call.columns), call).extra
    assert extra == {
        "solution": ["$2$", "$2$", ""],
        "gold_parsed": ["[2, '2']", "[2, '2']", "[unparseable]"],
        "answer_parsed": ["[2, '2']", "[unparseable]", "[skipped]"],
    }


def test_an_answer_that_never_ends_is_wrong(monkeypatch):
    """In a thread it would hold the interpreter, and no limit would end it."""
    monkeypatch.setattr(accuracy, "COMPARE_SECONDS", 1)
    endless = r"\boxed{9^{9^{9^9}}}"
    call = RewardCall(1, ["?"] * 2, [endless, r"\boxed{2}"], [[0]] * 2, {"solution": ["$2$"] * 2})
    started = time.monotonic()
    assert score(as_reward_specs(accuracy_reward), call, timeout=100).rewards.tolist() == [[0], [1]]
    assert time.monotonic() - started < 50
