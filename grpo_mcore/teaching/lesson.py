"""A lesson: question, the student's unaided answers and approach, a teaching, the taught answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, pstdev

from grpo_mcore.data.questions import Question
from grpo_mcore.data.text import extract_teaching
from grpo_mcore.rewards import Grader, RewardSpec, leaks_answer
from grpo_mcore.rewards.grading import STRICT_TEXT
from grpo_mcore.teaching.student import StudentWork


@dataclass(frozen=True)
class Attempt:
    """What the student did alone on one question."""

    question: Question
    baselines: list[str]
    approach: str
    grader: Grader = STRICT_TEXT
    log_likelihood: float | None = None
    """Of the reference answer after the baseline prompt, in nats; None: not asked for."""
    reference_tokens: int = 0
    """Of the reference answer, its end included; 0: there is none."""

    @cached_property
    def solutions(self) -> list[str]:
        """What the unaided answers give as their solutions."""
        return [self.grader.solution(baseline) for baseline in self.baselines]

    @cached_property
    def accuracy(self) -> float:
        """Share of the unaided answers that are right."""
        return fmean(self.grader.is_correct(s, self.question.answer) for s in self.solutions)


@dataclass(frozen=True)
class Lesson:
    """One teaching given on one attempt."""

    attempt: Attempt
    guidance: str
    """All the teacher wrote; the student sees what stands in its <teaching> tags."""
    teaching_tokens: int
    answer: str
    log_likelihood: float | None = None
    """Of the reference answer after the prompt with the teaching, in nats; None: not asked for."""

    @property
    def teaching(self) -> str:
        return extract_teaching(self.guidance)

    @property
    def solution(self) -> str:
        """What the taught answer gives as its solution."""
        return self.attempt.grader.solution(self.answer)

    @cached_property
    def correct(self) -> float:
        return self.attempt.grader.is_correct(self.solution, self.attempt.question.answer)

    @property
    def outcome(self) -> str:
        """What teaching has made of the student's accuracy on this question: "improved", "degraded"
        or "unchanged"."""
        change = self.correct - self.attempt.accuracy
        return "improved" if change > 0 else "degraded" if change < 0 else "unchanged"

    @cached_property
    def leaks(self) -> bool:
        """Whether the teaching gives the answer away."""
        question = self.attempt.question
        return leaks_answer(self.teaching, question.text, question.answer)

    def record(self) -> dict:
        """The lesson as JSON."""
        attempt = self.attempt
        return {
            "question": attempt.question.text,
            "ground_truth": attempt.question.answer,
            "approach": attempt.approach,
            "baselines": attempt.baselines,
            "guidance": self.guidance,
            "teaching": self.teaching,
            "teaching_tokens": self.teaching_tokens,
            "answer": self.answer,
            "outcome": self.outcome,
            "leaks": self.leaks,
            "likelihood_gain": self.likelihood_gain,
        }

    @property
    def likelihood_gain(self) -> float | None:
        """By how much the teaching raises the reference answer's log-likelihood, in nats; None
        where that was not asked for, or there is no reference."""
        if self.log_likelihood is None or not self.attempt.reference_tokens:
            return None
        return self.log_likelihood - self.attempt.log_likelihood


def collect_attempts(
    questions: list[Question],
    work: StudentWork,
    baseline_samples: int,
    grader: Grader = STRICT_TEXT,
) -> list[Attempt]:
    """Splits the student's texts: all unaided answers, then one approach a question. What it was
    not asked for of the reference answers is left open."""
    alone, probes = work.texts[: -len(questions)], work.texts[-len(questions) :]
    attempts = [
        Attempt(q, alone[i * baseline_samples : (i + 1) * baseline_samples], probes[i], grader)
        for i, q in enumerate(questions)
    ]
    if not work.log_likelihoods:
        return attempts
    return [
        replace(attempt, log_likelihood=found, reference_tokens=tokens)
        for attempt, found, tokens in zip(
            attempts, work.log_likelihoods, work.reference_tokens, strict=True
        )
    ]


def summarise(lessons: list[Lesson]) -> dict[str, float]:
    """How well teaching worked.

    Returns:
        Accuracies of the student alone and taught and their difference; the shares of lessons that
        improved and degraded the student, and of those that leak the answer; `non_degradation`, the
        share of questions answered right alone that stay right (1.0 where there are none); mean and
        standard deviation (n in the denominator, as in ATLAS) of the teachings' tokens; and, where
        it was asked for, `likelihood_gain`, the mean gain in nats a token of the reference answer.
    """
    alone = fmean(lesson.attempt.accuracy for lesson in lessons)
    taught = fmean(lesson.correct for lesson in lessons)
    gains = [
        lesson.likelihood_gain / lesson.attempt.reference_tokens
        for lesson in lessons
        if lesson.likelihood_gain is not None
    ]
    kept = [lesson.correct for lesson in lessons if lesson.attempt.accuracy == 1.0]
    tokens = [lesson.teaching_tokens for lesson in lessons]
    return {
        "baseline_accuracy": alone,
        "student_accuracy": taught,
        "accuracy_delta": taught - alone,
        "improvement_rate": fmean(lesson.outcome == "improved" for lesson in lessons),
        "degradation_rate": fmean(lesson.outcome == "degraded" for lesson in lessons),
        "non_degradation": fmean(kept) if kept else 1.0,
        "leak_rate": fmean(lesson.leaks for lesson in lessons),
        "teaching_length_mean": fmean(tokens),
        "teaching_length_std": pstdev(tokens),
    } | ({"likelihood_gain": fmean(gains)} if gains else {})


LIKELIHOOD_GAINS = "likelihood_gains"
"""The column that is measured only where a reward function names it; else it holds None."""
LESSON_COLUMNS: dict[str, Callable[[Lesson], object]] = {
    "questions": lambda lesson: lesson.attempt.question.text,
    "ground_truths": lambda lesson: lesson.attempt.question.answer,
    "baseline_solutions": lambda lesson: lesson.attempt.solutions,
    "solutions": lambda lesson: lesson.solution,
    "baseline_answers": lambda lesson: lesson.attempt.baselines,
    "answers": lambda lesson: lesson.answer,
    "student_approaches": lambda lesson: lesson.attempt.approach,
    "teachings": lambda lesson: lesson.teaching,
    "teaching_tokens": lambda lesson: lesson.teaching_tokens,
    LIKELIHOOD_GAINS: lambda lesson: lesson.likelihood_gain,
    "reference_tokens": lambda lesson: lesson.attempt.reference_tokens,
}
"""What reward functions are offered beside the dataset's columns."""


def measures_likelihood(specs: Sequence[RewardSpec]) -> bool:
    """Whether a reward wants to know how likely the student finds the right answers."""
    return any(spec.asks_for(LIKELIHOOD_GAINS) for spec in specs)
