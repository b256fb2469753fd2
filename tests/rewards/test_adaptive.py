"""The asymmetric reward, as the ATLAS documents state it."""

import pytest

from grpo_mcore.config import ConfigError
from grpo_mcore.rewards import (
    AdaptiveTeachingReward,
    RewardCall,
    accuracy,
    as_reward_specs,
    compute_teaching_reward,
    score,
)

RIGHT, WRONG = "42", "41"


def rewards(baselines, solutions, tokens=None, **settings):
    count = len(solutions)
    return AdaptiveTeachingReward(**settings)(
        prompts=["?"] * count,
        completions=["<thinking>long</thinking><teaching>one two three</teaching>"] * count,
        ground_truths=["42"] * count,
        baseline_solutions=baselines,
        solutions=solutions,
        teaching_tokens=tokens,
        student_approaches=["ignored"] * count,
    )


@pytest.mark.seed(29, 34, 35)
def test_every_change_of_one_answer():
    found = rewards([WRONG, RIGHT, RIGHT, WRONG], [RIGHT, RIGHT, WRONG, WRONG], [100, 0, 7, 0])
    assert found == [1.5, 0.0, -2.0, 0.0]


@pytest.mark.seed(29, 35)
@pytest.mark.parametrize("tokens, expected", [(0, 2.0), (50, 1 + 100 / 150), (300, 1.25)])
def test_help_is_worth_more_when_short(tokens, expected):
    assert rewards([WRONG], [RIGHT], [tokens]) == [pytest.approx(expected)]


@pytest.mark.seed(29, 35)
def test_harm_costs_the_same_at_any_length():
    assert rewards([RIGHT] * 2, [WRONG] * 2, [0, 1000]) == [-2.0, -2.0]


@pytest.mark.seed(31, 32)
def test_settings_weigh_harm_and_brevity():
    found = rewards(
        [WRONG, RIGHT],
        [RIGHT, WRONG],
        [100, 100],
        degradation_penalty_multiplier=3.0,
        efficiency_weight=0.5,
    )
    assert found == [1.25, -3.0]


def test_several_baselines_are_averaged():
    baselines = [[RIGHT, WRONG, WRONG, WRONG]] * 2
    assert rewards(baselines, [RIGHT, WRONG], [100, 100]) == [0.75 * 1.5, -2.0 * 0.25]


def test_words_of_the_teaching_are_counted_where_tokens_are_not_given():
    assert rewards([WRONG], [RIGHT]) == [pytest.approx(1 + 100 / 103)]


def test_blanks_and_case_do_not_count():
    assert rewards([["41"], "42"], ["42", " 42 "], [100, 100]) == [1.5, 0.0]


@pytest.mark.seed(33)
def test_performance_is_an_exact_match_but_for_case():
    evaluate = AdaptiveTeachingReward().evaluate_student_performance
    assert evaluate("question", "Forty-Two", "forty-two ") == 1.0
    assert evaluate("question", "the answer is 42", "42") == 0.0
    assert evaluate("question", "<solution>42", "42") == 0.0
    assert evaluate("question", "", "42") == 0.0


@pytest.mark.seed(34)
def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        rewards([WRONG], [RIGHT, RIGHT], [1, 1])


@pytest.mark.seed(30)
def test_a_tokenizer_counts_the_tokens_where_they_are_not_given():
    class Letters:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return list(text)

    models = object(), object()
    reward = AdaptiveTeachingReward(*models, Letters())
    assert (reward.student_model, reward.teacher_model) == models
    letters = len("one two three")
    given = {"ground_truths": ["42"], "baseline_solutions": [WRONG], "solutions": [RIGHT]}
    texts = ["?"], ["<thinking>long</thinking><teaching>one two three</teaching>"]
    assert reward(*texts, **given) == [pytest.approx(1 + 100 / (100 + letters))]
    assert reward(*texts, **given, teaching_tokens=[0]) == [2.0]
    plain = AdaptiveTeachingReward()
    assert plain.student_model is plain.teacher_model is plain.tokenizer is None


CHANGES = [[WRONG], [RIGHT], [RIGHT], [WRONG]], [RIGHT, RIGHT, WRONG, WRONG]
"""Improved, right both times, degraded, wrong both times."""


@pytest.mark.seed(35)
@pytest.mark.parametrize(
    "formula, expected",
    [("seed", [1.5, 0, -2, 0]), ("docs", [1.5, 0.75, 0, 0]), ("rcl", [1, 0, -1, 0])],
)
def test_formulas_at_a_hundred_tokens(formula, expected):
    assert rewards(*CHANGES, [100] * 4, formula=formula) == expected


def test_weights_and_lengths_of_the_formula_in_the_docs():
    found = rewards(*CHANGES, [0, 300, 0, 0], formula="docs", efficiency_weight=0.5)
    assert found == [1.5, 0.5 * 1.125, 0, 0]


def test_the_formula_that_was_run_rewards_a_shorter_solution():
    class Letters:
        def encode(self, text, add_special_tokens):
            return list(text)

    reward = AdaptiveTeachingReward(formula="rcl", answer_match="math", tokenizer=Letters())
    found = reward(
        ["?"] * 5,
        ["teach"] * 5,
        ground_truths=["42"] * 5,
        baseline_solutions=["41.00", "42.00", "42", "42.0", ""],
        solutions=["42", "42", "42.00", "4", "42"],
    )
    assert found == [1 + 3 / 5, 3 / 5, 0, -1, 1]


def test_several_baselines_in_formulas_of_four_cases():
    """The mean over the unaided answers of what each alone would give."""
    several = [[RIGHT, WRONG, WRONG, WRONG]] * 2, [RIGHT, WRONG], [100] * 2
    assert rewards(*several, formula="docs") == [(0.75 + 3 * 1.5) / 4, 0]
    assert rewards(*several, formula="rcl") == [3 / 4, -1 / 4]


def test_ground_truths_as_mathematics():
    given = [["84/2"], ["42.0"]], ["42.0", "43"], [100] * 2
    assert rewards(*given) == [0, 0]
    assert rewards(*given, answer_match="math") == [0, -2]


@pytest.mark.parametrize("setting", ["formula", "answer_match"])
def test_unknown_choices_are_refused(setting):
    with pytest.raises(ConfigError, match=f"{setting}=other: choose one of"):
        AdaptiveTeachingReward(**{setting: "other"})


@pytest.mark.parametrize(
    "scores, expected",
    [((0, 1, 50), 1.75), ((0.5, 0.75, 400), 0.25), ((1, 0.5, 100), -2.0), ((1, 1, 0), 1.0)],
)
def test_the_overviews_reward(scores, expected):
    assert compute_teaching_reward(*scores) == expected


@pytest.mark.parametrize(
    "arguments, error",
    [
        ((-0.1, 0, 1), ValueError), ((0, 1.1, 1), ValueError), ((0, 1, -1), ValueError),
        ((0, float("nan"), 1), ValueError), (("0", 1, 1), TypeError), ((0, 1, None), TypeError),
    ],
)  # fmt: skip
def test_what_the_overviews_reward_refuses(arguments, error):
    with pytest.raises(error):
        compute_teaching_reward(*arguments)


def test_an_endless_answer_is_wrong_and_keeps_nobody_waiting(monkeypatch):
    """As math-verify's signals reach the main thread only, no other is given the reward."""
    monkeypatch.setattr(accuracy, "COMPARE_SECONDS", 1)
    columns = {
        "ground_truths": ["42"] * 2,
        "baseline_solutions": [["41"]] * 2,
        "solutions": ["9^{9^{9^9}}", "84/2"],
        "teaching_tokens": [100] * 2,
    }
    call = RewardCall(1, ["?"] * 2, ["add"] * 2, [[0]] * 2, columns)
    specs = as_reward_specs(AdaptiveTeachingReward(answer_match="math"))
    assert score(specs, call, timeout=100).rewards.tolist() == [[0], [1.5]]
