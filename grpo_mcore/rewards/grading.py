"""How a student's answers are read and judged: the same wherever accuracy is computed."""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_mcore.config.bounds import check_choice
from grpo_mcore.data.text import extract_solution, extract_solution_leniently, is_correct
from grpo_mcore.rewards.accuracy import is_same_mathematics


def is_correct_mathematics(solution: str, ground_truth: str) -> float:
    """1.0 where both are the same text (`is_correct`) or the same mathematics, else 0.0."""
    same = is_correct(solution, ground_truth) or is_same_mathematics(solution, ground_truth)
    return float(same)


EXTRACTIONS: dict[str, Callable[[str], str]] = {
    "strict": extract_solution,
    "lenient": extract_solution_leniently,
}
ANSWER_MATCHES: dict[str, Callable[[str, str], float]] = {
    "text": is_correct,
    "math": is_correct_mathematics,
}


@dataclass(frozen=True)
class Grader:
    """
    Attributes:
        extraction: one of EXTRACTIONS.
        answer_match: one of ANSWER_MATCHES.
    """

    extraction: str = "strict"
    answer_match: str = "text"

    def __post_init__(self):
        """
        Raises:
            ConfigError: for an unknown choice.
        """
        check_choice("extraction", self.extraction, EXTRACTIONS)
        check_choice("answer_match", self.answer_match, ANSWER_MATCHES)

    def solution(self, text: str) -> str:
        """What an answer gives as its solution; "" where it gives none."""
        return EXTRACTIONS[self.extraction](text)

    def is_correct(self, solution: str, ground_truth: str) -> float:
        """1.0 where the solution is the ground truth, else 0.0."""
        return ANSWER_MATCHES[self.answer_match](solution, ground_truth)


STRICT_TEXT = Grader()
"""As in ATLAS's reference of its trainers."""
