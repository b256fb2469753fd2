"""Teachings that give the answer away, and those that do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_mcore.rewards import leak_penalty, leaks_answer
from grpo_mcore.rewards.leak import PROSE_NUMBERS
from tools.leak_rates import rates

PROSE = "Try it again, and check the {} of your work"
numbers = st.integers(PROSE_NUMBERS + 1, 10**6)


@pytest.mark.parametrize(
    "teaching, question, answer",
    [
        ("you should get 1,000 in all", "tom has 3", "1000.0"),
        ("that makes forty-two", "?", "42"),
        ("one hundred and five of them", "?", "105"),
        ("two thousand and thirty one", "?", "2031"),
        ("it comes to 42", "?", "forty two"),
        ("16-4 = 12m", "?", "12"),
        ("so 2km/hr, or $4/student", "?", "2"),
        ("so 2km/hr, or $4/student", "?", "4"),
        ("that is $.25 more", "?", "0.25"),
        ("half of it: 0.5", "?", r"\frac{1}{2}"),
        (r"so \frac{3}{4} is left", "?", "0.75"),
        ("you get 7.", "tom has 3 apples", "7 apples"),
        ("it costs $42!", "?", "42"),
        ("think of PARIS", "the capital of France?", "Paris."),
        (r"now \boxed{x+1}", "?", "x + 1"),
        # What the question holds, or any text has, leaks where it is announced.
        ("So the answer is 5.", "5 of 9", "5"),
        ("Answer: yes", "is it?", "yes"),
        ("<solution>a</solution>", "a or b?", "a"),
        ("the answer is Paris", "Paris or Rome?", "Paris"),
        (r"so \boxed{\frac{1}{2}}", "1/2 or 1/3?", "0.5"),
    ],
)
def test_leaks(teaching, question, answer):
    assert leaks_answer(teaching, question, answer)


@pytest.mark.parametrize(
    "teaching, question, answer",
    [
        ("start with the 5 cards", "tom has 5 cards", "5"),
        ("the answer is 5 more than x", "5 more than x", "5"),
        ("divide: 18/6", "?", "3"),
        ("1. read\n2. add", "?", "2"),
        ("Step 3: add", "?", "3"),
        ("there are two ways, five and six", "?", "11"),
        ("it is 420, or 1.42, or 42nd", "?", "42"),
        ("subtract 3", "?", "-3"),
        ("add 5 and 7", "tom has five apples", "5"),
        ("it goes at 20 mph", "a 20mph wind", "20"),
        ("the price is 1,200 or 3.5", "?", "1"),
        ("yes, you can, and that is not true", "is it?", "no"),
        ("a good plan", "a or b?", "a"),
        ("weigh Paris against Rome", "Paris or Rome?", "Paris"),
        ("the Parisian way", "?", "Paris"),
        ("", "?", "42"),
        ("anything at all 1/0", "?", "."),
        ("9" * 5000, "?", "9"),
        ("9", "?", "9" * 5000),
    ],
)
def test_does_not_leak(teaching, question, answer):
    assert not leaks_answer(teaching, question, answer)


@given(numbers, st.sampled_from(["{}", "{:,}", "{}.0", "${}", "{} cards", "({})", "{}."]))
def test_a_number_is_found_however_it_is_written(number, form):
    assert leaks_answer(PROSE.format(form.format(number)), "tom has 3", str(number))
    assert leaks_answer(PROSE.format(number), "tom has 3", form.format(number).strip("()"))


@given(st.lists(numbers), st.lists(numbers, min_size=1), st.data())
def test_numbers_of_the_question_are_no_leak(others, asked, data):
    answer = data.draw(st.sampled_from(asked))
    others = [number for number in others if number != answer]
    question = "Given " + " and ".join(map(str, asked))
    assert not leaks_answer(PROSE.format(" ".join(map(str, others + asked))), question, str(answer))


@given(numbers, numbers)
def test_other_numbers_are_no_leak(number, other):
    assert leaks_answer(PROSE.format(other), "?", str(number)) == (number == other)


@given(st.text(alphabet="abcdefghij ", max_size=200), st.text(alphabet="abcdefghij", max_size=2))
def test_short_answers_are_found_in_no_prose(prose, answer):
    assert not leaks_answer(prose, "?", answer)


@given(st.text(), st.text(), st.text())
def test_any_text_can_be_asked_about(teaching, question, answer):
    assert leaks_answer(teaching, question, answer) in (True, False)


@pytest.mark.parametrize("part", ["the answer is x", "<solution>", "\\boxed{", "\n"])
def test_hostile_texts_are_read_at_once(part):
    """Each as if the answer could begin anywhere would take minutes."""
    assert not leaks_answer(part * 20_000 + " " * 50_000 + "y", "?", "42")


def test_rates_of_worked_answers():
    rows = [
        {"question": "Tom has 3 cards and buys 4. How many?",
         "answer": "He has 3+4=<<3+4=7>>7.\n#### 7"},
        {"question": "Ann has 20 pens, twice as many as Bo. How many?",
         "answer": "Halve 20.\nBo has 20/2 = 10.\nBoth have 20+10 = 30 pens.\n#### 30"},
        {"question": "Of 10 birds 5 fly off. How many stay?", "answer": "10 - 5 = 5 stay.\n#### 5"},
    ]  # fmt: skip
    assert rates(rows) == {
        "whole, answer not in question": (2, 2),
        "whole, answer in question": (0, 1),
        "lines before the answer": (0, 1),
        "of another question": (0, 3),
    }


def test_the_penalty_is_a_reward_of_its_own():
    assert leak_penalty(["it is 42", "add"], ["?"] * 2, ["42"] * 2) == [-1.0, 0.0]
