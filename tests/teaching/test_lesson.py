"""The figures a set of lessons is summed up in."""

import pytest

from grpo_mcore.data.questions import Question
from grpo_mcore.teaching.lesson import Attempt, Lesson, collect_attempts, summarise
from grpo_mcore.teaching.student import StudentWork

RIGHT, WRONG = "<solution>42</solution>", "<solution>41</solution>"
QUESTION = Question(0, "?", "42", {})


def lesson(baselines, answer, tokens=10):
    guidance = "<thinking>hm</thinking><teaching>add</teaching>"
    return Lesson(Attempt(QUESTION, baselines, "add"), guidance, tokens, answer)


def test_accuracies_of_one_lesson():
    taught = lesson([RIGHT, WRONG, WRONG, WRONG], RIGHT)
    assert taught.attempt.accuracy == 0.25
    assert taught.correct == 1.0
    assert taught.teaching == "add"


def test_summary():
    lessons = [
        lesson([RIGHT], RIGHT, 10),
        lesson([RIGHT], WRONG, 20),
        lesson([WRONG], RIGHT, 30),
        lesson([WRONG], RIGHT, 40),
        lesson([RIGHT, WRONG], WRONG, 0),
    ]
    assert summarise(lessons) == pytest.approx(
        {
            "baseline_accuracy": 2.5 / 5,
            "student_accuracy": 3 / 5,
            "accuracy_delta": 0.1,
            "non_degradation": 1 / 2,  # of the two answered right alone, every time
            "teaching_length_mean": 20.0,
        }
    )


def test_nothing_right_alone_cannot_degrade():
    assert summarise([lesson([WRONG], WRONG)])["non_degradation"] == 1.0


def test_attempts_are_dealt_question_by_question():
    questions = [Question(n, f"q{n}", "42", {}) for n in range(2)]
    work = StudentWork(["a0", "a1", "b0", "b1", "plan a", "plan b"], 0.0, 1.0)
    assert collect_attempts(questions, work, baseline_samples=2) == [
        Attempt(questions[0], ["a0", "a1"], "plan a"),
        Attempt(questions[1], ["b0", "b1"], "plan b"),
    ]
