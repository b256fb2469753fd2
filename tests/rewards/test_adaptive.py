"""The asymmetric reward, as the ATLAS documents state it."""

import pytest

from grpo_mcore.rewards import AdaptiveTeachingReward

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
