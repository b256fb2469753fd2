"""Templates and extraction survive whatever a model or a dataset writes."""

import pytest

from grpo_mcore.config import TemplatesConfig
from grpo_mcore.data.text import (
    extract_solution,
    extract_teaching,
    fields_of,
    fill,
    is_correct,
)


@pytest.mark.seed(22, 23, 24, 25)
def test_fields_are_replaced_by_name():
    assert fill("{a} and {b}, {a}", a="x", b="y") == "x and y, x"


@pytest.mark.parametrize("text", ["{b}", "{0}", "{}", "{{b}}", "f(x) = {x | x > 0}", "\\1 \\g<0>"])
def test_braces_in_user_text_are_left_alone(text):
    assert fill("Q: {a} B: {b}", a=text, b="y") == f"Q: {text} B: y"


def test_other_braces_in_the_template_are_left_alone():
    assert fill('{"answer": {a}} {unknown} {}', a="1") == '{"answer": 1} {unknown} {}'


@pytest.mark.seed(22, 23, 24, 25)
def test_fields_of_the_default_templates():
    templates = TemplatesConfig()
    assert fields_of(templates.baseline) == fields_of(templates.diagnostic) == {"question"}
    assert fields_of(templates.adaptive) == {"question", "approach"}
    assert fields_of(templates.with_teaching) == {"question", "teaching"}


@pytest.mark.seed(28)
@pytest.mark.parametrize(
    "text, solution",
    [
        ("so <solution> 42 </solution>.", "42"),
        ("<solution>1</solution> no, <solution>2</solution>", "2"),
        ("<solution>\n4\n2\n</solution>", "4\n2"),
        ("the answer is 42", ""),
        ("<solution>42", ""),
        ("42</solution>", ""),
        ("<solution></solution>", ""),
        ("", ""),
    ],
)
def test_solution_is_between_the_last_tags(text, solution):
    assert extract_solution(text) == solution


@pytest.mark.parametrize(
    "text, teaching",
    [
        ("<thinking>hm</thinking> <teaching>\nfirst add\n</teaching>", "first add"),
        ("<teaching>a</teaching><teaching>b</teaching>", "a"),
        (" first add ", "first add"),
        ("<teaching>first add", "<teaching>first add"),
        ("<teaching></teaching>", ""),
    ],
)
def test_teaching_is_between_the_first_tags_or_everything(text, teaching):
    assert extract_teaching(text) == teaching


@pytest.mark.parametrize(
    "solution, truth, score",
    [("Paris", "paris ", 1.0), ("42", "42", 1.0), ("42.0", "42", 0.0), ("", "42", 0.0)],
)
def test_correct_is_the_same_text_but_for_case_and_blanks(solution, truth, score):
    assert is_correct(solution, truth) == score
