"""The asymmetric reward of the ATLAS documents: short help is worth more, harm costs double."""

from collections.abc import Sequence
from typing import Any

from grpo_mcore.data.text import extract_teaching, is_correct

CONCISE_TOKENS = 100
"""Half of the conciseness bonus is gone at this many teaching tokens."""


class AdaptiveTeachingReward:
    """With d = accuracy with teaching - accuracy without, and n the teaching's tokens:

        d < 0:   -degradation_penalty_multiplier * |d|
        else:    d * (1 + efficiency_weight * 100 / (100 + n))

    (ATLAS trainers API reference, AdaptiveTeachingReward.) No change, both right included, is 0.
    """

    def __init__(
        self,
        student_model: Any = None,
        teacher_model: Any = None,
        tokenizer: Any = None,
        degradation_penalty_multiplier: float = 2.0,
        efficiency_weight: float = 1.0,
    ):
        """
        Args:
            student_model, teacher_model: kept for the user; no part of the reward.
            tokenizer: a transformers tokenizer that counts a teaching's tokens where nobody tells
                them; TeacherGRPOTrainer does.
        """
        self.student_model, self.teacher_model = student_model, teacher_model
        self.tokenizer = tokenizer
        self.degradation_penalty_multiplier = degradation_penalty_multiplier
        self.efficiency_weight = efficiency_weight

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
            self.reward(
                self.evaluate_student_performance("", solution, truth)
                - self._baseline(baseline, truth),
                tokens,
            )
            for solution, baseline, truth, tokens in zip(
                solutions, baseline_solutions, ground_truths, teaching_tokens, strict=True
            )
        ]

    def reward(self, delta: float, teaching_tokens: int) -> float:
        """The formula, for one accuracy difference in [-1, 1]."""
        if delta < 0:
            return -self.degradation_penalty_multiplier * abs(delta)
        bonus = CONCISE_TOKENS / (CONCISE_TOKENS + teaching_tokens)
        return delta * (1 + self.efficiency_weight * bonus)

    def evaluate_student_performance(
        self, question: str, solution: str, ground_truth: str
    ) -> float:
        """1.0 where the solution is the ground truth, case aside, else 0.0."""
        return is_correct(solution, ground_truth)

    def _count(self, teaching: str) -> int:
        if self.tokenizer is None:
            return len(teaching.split())
        return len(self.tokenizer.encode(teaching, add_special_tokens=False))

    def _baseline(self, baseline: str | Sequence[str], truth: str) -> float:
        texts = [baseline] if isinstance(baseline, str) else baseline
        scores = [self.evaluate_student_performance("", text, truth) for text in texts]
        return sum(scores) / len(scores)
