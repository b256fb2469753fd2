"""A lesson: question, the student's unaided answers and approach, a teaching, the taught answer."""

from dataclasses import dataclass, replace

from grpo_mcore.data.questions import Question
from grpo_mcore.data.text import extract_solution, extract_teaching, is_correct
from grpo_mcore.teaching.student import StudentWork


@dataclass(frozen=True)
class Attempt:
    """What the student did alone on one question."""

    question: Question
    baselines: list[str]
    approach: str
    log_likelihood: float | None = None
    """Of the reference answer after the baseline prompt, in nats; None: not asked for."""
    reference_tokens: int = 0
    """Of the reference answer, its end included; 0: there is none."""

    @property
    def solutions(self) -> list[str]:
        """What the unaided answers give as their solutions."""
        return [extract_solution(baseline) for baseline in self.baselines]

    @property
    def accuracy(self) -> float:
        """Share of the unaided answers that are right."""
        right = [is_correct(solution, self.question.answer) for solution in self.solutions]
        return sum(right) / len(right)


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
    def correct(self) -> float:
        return is_correct(extract_solution(self.answer), self.attempt.question.answer)

    @property
    def likelihood_gain(self) -> float | None:
        """By how much the teaching raises the reference answer's log-likelihood, in nats; None
        where that was not asked for, or there is no reference."""
        if self.log_likelihood is None or not self.attempt.reference_tokens:
            return None
        return self.log_likelihood - self.attempt.log_likelihood


def collect_attempts(
    questions: list[Question], work: StudentWork, baseline_samples: int
) -> list[Attempt]:
    """Splits the student's texts: all unaided answers, then one approach a question. What it was
    not asked for of the reference answers is left open."""
    alone, probes = work.texts[: -len(questions)], work.texts[-len(questions) :]
    attempts = [
        Attempt(q, alone[i * baseline_samples : (i + 1) * baseline_samples], probes[i])
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
        Accuracies of the student alone and taught and their difference; `non_degradation`, the
        share of questions answered right alone that stay right (1.0 where there are none); the
        mean number of teaching tokens; and, where it was asked for, `likelihood_gain`, the mean
        gain in nats a token of the reference answer.
    """
    count = len(lessons)
    alone = sum(lesson.attempt.accuracy for lesson in lessons) / count
    taught = sum(lesson.correct for lesson in lessons) / count
    gains = [
        lesson.likelihood_gain / lesson.attempt.reference_tokens
        for lesson in lessons
        if lesson.likelihood_gain is not None
    ]
    kept = [lesson.correct for lesson in lessons if lesson.attempt.accuracy == 1.0]
    return {
        "baseline_accuracy": alone,
        "student_accuracy": taught,
        "accuracy_delta": taught - alone,
        "non_degradation": sum(kept) / len(kept) if kept else 1.0,
        "teaching_length_mean": sum(lesson.teaching_tokens for lesson in lessons) / count,
    } | ({"likelihood_gain": sum(gains) / len(gains)} if gains else {})
