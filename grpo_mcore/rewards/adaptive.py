"""The rewards of teaching in the ATLAS documents and code: help is worth more than no change, harm
less."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.data.text import extract_teaching
from grpo_mcore.rewards.grading import ANSWER_MATCHES

CONCISE_TOKENS = 100
"""Half of the conciseness bonus is gone at this many teaching tokens."""
CONCISE_LENGTH, HARM = 200, 2.0
"""Of `compute_teaching_reward`: where its bonus ends, and what harm costs."""


@dataclass(frozen=True)
class Change:
    """What a teaching has changed.

    Attributes:
        alone, taught: accuracy without and with teaching, in [0, 1].
        bonus: 100 / (100 + the teaching's tokens), in (0, 1].
        shortening: the share of the unaided solution's tokens that the taught one saves, in [0, 1].
        multiplier, weight: `degradation_penalty_multiplier` and `efficiency_weight`.
    """

    alone: float
    taught: float
    bonus: float
    shortening: float
    multiplier: float
    weight: float


def _seed(change: Change) -> float:
    delta = change.taught - change.alone
    if delta < 0:
        return -change.multiplier * abs(delta)
    return delta * (1 + change.weight * change.bonus)


def _docs(change: Change) -> float:
    if change.taught < change.alone:
        return 0.0
    gained = 0.5 * change.taught if change.taught == change.alone else change.taught - change.alone
    return gained * (1 + change.weight * change.bonus)


def _rcl(change: Change) -> float:
    if change.taught < change.alone:
        return -1.0
    improved = float(change.taught > change.alone)
    return improved + (change.shortening if change.taught else 0.0)


FORMULAS: dict[str, Callable[[Change], float]] = {"seed": _seed, "rcl": _rcl, "docs": _docs}


class AdaptiveTeachingReward:
    """With d = accuracy with teaching - accuracy without, n the teaching's tokens,
    e = 100 / (100 + n), m `degradation_penalty_multiplier` and w `efficiency_weight`:

        formula   improved      right both times   degraded   wrong both times
        "seed"    d (1 + w e)   0                  -m |d|     0
        "docs"    d (1 + w e)   0.5 (1 + w e)      0          0
        "rcl"     1 + s         s                  -1         0

    s is the share of the unaided solution's tokens that the taught solution saves, 0 where it is
    longer. Sources: "seed" ATLAS's trainers API reference; "docs" its page on reward design
    (docs/concepts/reward-design.md of Arc-Computer/RCL); "rcl" the code that was run
    (trainers/teacher_rewards.py there), which reads neither m nor w. With "seed" nothing rewards
    being short where the student is right anyway.

    With several unaided answers, "seed" takes d from their mean accuracy; "docs" and "rcl", which
    tell four cases apart, are averaged over the answers.
    """

    def __init__(
        self,
        student_model: Any = None,
        teacher_model: Any = None,
        tokenizer: Any = None,
        degradation_penalty_multiplier: float = 2.0,
        efficiency_weight: float = 1.0,
        formula: str = "seed",
        answer_match: str = "text",
    ):
        """
        Args:
            student_model, teacher_model: kept for the user; no part of the reward.
            tokenizer: a transformers tokenizer that counts tokens; TeacherGRPOTrainer gives its
                teacher's. None: words are counted.
            formula: one of FORMULAS.
            answer_match: whether ground truths are compared as "text" or as mathematics, "math".

        Raises:
            ConfigError: for an unknown choice.
        """
        check_choice("formula", formula, FORMULAS)
        check_choice("answer_match", answer_match, ANSWER_MATCHES)
        self.student_model, self.teacher_model = student_model, teacher_model
        self.tokenizer = tokenizer
        self.degradation_penalty_multiplier = degradation_penalty_multiplier
        self.efficiency_weight = efficiency_weight
        self.formula, self.answer_match = formula, answer_match

    @property
    def limits_itself(self) -> bool:
        """As math-verify does, in the main thread (`rewards.reward`)."""
        return self.answer_match == "math"

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        ground_truths: Sequence[str],
        baseline_solutions: Sequence[str | Sequence[str]],
        solutions: Sequence[str],
        teaching_tokens: Sequence[int] | None = None,
        **_,
    ) -> list[float]:
        """One reward for each completion.

        Args:
            completions: what the teacher wrote.
            baseline_solutions: the student's extracted answers without teaching, one for each
                completion, or several to average.
            solutions: its extracted answers with teaching.
            teaching_tokens: tokens of each teaching; None: what the tokenizer counts, or words
                where there is none.
        """
        if teaching_tokens is None:
            teaching_tokens = [self._count(extract_teaching(text)) for text in completions]
        return [
            self._reward([baseline] if isinstance(baseline, str) else baseline, *sample)
            for baseline, *sample in zip(
                baseline_solutions, solutions, ground_truths, teaching_tokens, strict=True
            )
        ]

    def evaluate_student_performance(
        self, question: str, solution: str, ground_truth: str
    ) -> float:
        """1.0 where the solution is the ground truth, case aside (or as mathematics), else 0.0."""
        return ANSWER_MATCHES[self.answer_match](solution, ground_truth)

    def _reward(self, baselines: Sequence[str], solution: str, truth: str, tokens: int) -> float:
        taught = self.evaluate_student_performance("", solution, truth)
        alone = [self.evaluate_student_performance("", text, truth) for text in baselines]
        shortenings = [self._shortening(text, solution) for text in baselines]
        if self.formula == "seed":
            alone, shortenings = [_mean(alone)], [_mean(shortenings)]
        weights = self.degradation_penalty_multiplier, self.efficiency_weight
        bonus = CONCISE_TOKENS / (CONCISE_TOKENS + tokens)
        return _mean(
            [
                FORMULAS[self.formula](Change(accuracy, taught, bonus, shortening, *weights))
                for accuracy, shortening in zip(alone, shortenings, strict=True)
            ]
        )

    def _shortening(self, baseline: str, solution: str) -> float:
        before, after = self._count(baseline), self._count(solution)
        return max(0.0, (before - after) / before) if before else 0.0

    def _count(self, text: str) -> int:
        if self.tokenizer is None:
            return len(text.split())
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def compute_teaching_reward(
    baseline_score: float, enhanced_score: float, teaching_length: float
) -> float:
    """The reward on ATLAS's overview of its trainers: improvement + max(0, 1 - length / 200), less
    2.0 where teaching makes it worse.

    Args:
        baseline_score, enhanced_score: without and with teaching, in [0, 1].
        teaching_length: at least 0.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number out of range.
    """
    scores = {"baseline_score": baseline_score, "enhanced_score": enhanced_score}
    for name, value in (scores | {"teaching_length": teaching_length}).items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be a number")
    for name, value in scores.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must be between 0 and 1")
    if not teaching_length >= 0:
        raise ValueError(f"teaching_length={teaching_length}: must be at least 0")
    bonus = max(0.0, 1 - teaching_length / CONCISE_LENGTH)
    harm = HARM if enhanced_score < baseline_score else 0.0
    return enhanced_score - baseline_score + bonus - harm


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
