"""How answers are read and judged."""

import pytest

from grpo_mcore.config import ConfigError
from grpo_mcore.data.text import extract_solution_leniently, extract_teaching
from grpo_mcore.rewards import Grader


@pytest.mark.seed(28)
@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("<solution> 4 </solution>", "4", "4"),
        ("4", "", ""),
        ("the answer is 4", "", ""),  # ATLAS's static helper, not its trainer, guesses here
        (r"\boxed{1} or \boxed{\frac{1}{2}}", "", r"\frac{1}{2}"),
        (r"\boxed{5} <solution>4</solution>", "4", "5"),
        (r"\boxed{5 <solution>4</solution>", "4", "4"),
        ("<solution>3 + 1 makes 4 cards</solution>", "3 + 1 makes 4 cards", "4"),
        ("<solution>The answer is: blue.</solution>", "The answer is: blue.", "blue"),
        ("<solution>blue</solution>", "blue", "blue"),
        ("<solution>1,200, or -3.5</solution>", "1,200, or -3.5", "-3.5"),
        ("<solution>1,200</solution>", "1,200", "1,200"),
    ],
)
def test_solutions_are_read_strictly_or_leniently(text, strict, lenient):
    assert Grader().solution(text) == strict
    assert Grader("lenient").solution(text) == lenient


@pytest.mark.parametrize(
    "solution, truth, as_text, as_math",
    [
        ("Blue ", "blue", 1, 1),
        ("0.5", "1/2", 0, 1),
        (r"$\frac{1}{2}$", "0.5", 0, 1),
        ("1,000", "1000.0", 0, 1),
        (r"3\sqrt{2}", r"\sqrt{18}", 0, 1),
        ("1 + x", "x+1", 0, 1),
        ("41", "42", 0, 0),
        ("the answer is 42", "42", 0, 0),
        ("listen", "silent", 0, 0),
        ("", "42", 0, 0),
        ("42.", "42", 0, 1),
        ("5 cm", "5", 0, 1),
        ("12 km", "12 m", 0, 0),
        ("3:30 am", "3:30 pm", 0, 0),
        ("no", "on", 0, 0),
        ("2yx", "2xy", 0, 1),
        ("\\frac{", "42", 0, 0),
    ],
)
def test_answers_are_compared_as_text_or_as_mathematics(solution, truth, as_text, as_math):
    assert Grader().is_correct(solution, truth) == as_text
    assert Grader(answer_match="math").is_correct(solution, truth) == as_math


@pytest.mark.parametrize("tag", ["<solution>", "\\boxed{", "<teaching>"])
def test_tags_without_end_are_read_at_once(tag):
    """Each as if it could be the last would take minutes."""
    text = tag * 20_000
    assert (extract_solution_leniently(text), extract_teaching(text)) == ("", text)


@pytest.mark.parametrize("setting", ["extraction", "answer_match"])
def test_unknown_choices_are_refused(setting):
    with pytest.raises(ConfigError, match=f"{setting}=other: choose one of"):
        Grader(**{setting: "other"})
