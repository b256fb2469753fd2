"""The figures a set of lessons is summed up in."""

import pytest

from grpo_mcore.data.questions import Question
from grpo_mcore.rewards import Grader
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
    assert taught.outcome == "improved"
    assert lesson([RIGHT, WRONG], WRONG).outcome == "degraded"
    assert lesson([WRONG], "<solution></solution>").outcome == "unchanged"


def test_a_grader_reads_and_judges_all_answers():
    loose = Grader("lenient", "math")
    attempt = Attempt(QUESTION, [r"\boxed{84/2}", WRONG, "42"], "add", loose)
    assert attempt.solutions == ["84/2", "41", ""]
    assert attempt.accuracy == pytest.approx(1 / 3)
    assert Lesson(attempt, "", 0, "<solution>so the answer is 42.0</solution>").correct == 1.0
    assert Attempt(QUESTION, attempt.baselines, "add").accuracy == 0.0


def test_a_lesson_that_gives_the_answer_away():
    attempt = Attempt(QUESTION, [WRONG], "add")
    guidance = "<thinking>42</thinking><teaching>{}</teaching>"
    assert not Lesson(attempt, guidance.format("add 40 and 2"), 5, RIGHT).leaks
    told = Lesson(attempt, guidance.format("it is 42"), 5, RIGHT)
    assert told.leaks
    assert told.record() == {
        "question": "?",
        "ground_truth": "42",
        "approach": "add",
        "baselines": [WRONG],
        "guidance": "<thinking>42</thinking><teaching>it is 42</teaching>",
        "teaching": "it is 42",
        "teaching_tokens": 5,
        "answer": RIGHT,
        "outcome": "improved",
        "leaks": True,
        "likelihood_gain": None,
    }


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
            "improvement_rate": 2 / 5,
            "degradation_rate": 2 / 5,  # of these one was right alone half of the times
            "leak_rate": 0.0,
            "non_degradation": 1 / 2,  # of the two answered right alone, every time
            "teaching_length_mean": 20.0,
            "teaching_length_std": 200**0.5,
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
