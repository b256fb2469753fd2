"""Whether an answer equals the solution, as math-verify judges."""

import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

from grpo_mcore.data.chat import Text
from grpo_mcore.rewards.specs import reward
from grpo_mcore.rewards.text import text_of

PARSE_SECONDS, COMPARE_SECONDS = 10, 5
"""What one answer may take, as in TRL; then it counts as wrong. An answer such as 9^9^9^9 would
take for ever."""
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_DOLLAR = re.compile(r"\\?\$")
_WORD = re.compile(r"[^\W\d_]{3}|^[^\W\d_]{2}$")
_LETTER = re.compile(r"[^\W\d_]")


@reward(limits_itself=True)
def accuracy_reward(
    completions: Sequence[Text],
    solution: Sequence[str],
    log_extra: Callable[[str, list], None] | None = None,
    **_,
) -> list[float | None]:
    r"""1.0 where the completion's LaTeX, \boxed{} before any other, is mathematically the same as
    the solution, 0.0 where not, None where nothing can be read from the solution
    (trl.rewards.accuracy_reward).

    math-verify limits itself with signals, which only the main thread gets; elsewhere it takes what
    time it takes, and may hold the interpreter all the while.
    """
    from math_verify import parse  # sympy takes a while to import

    rewards: list[float | None] = []
    golds, answers = [], []
    for completion, truth in zip(completions, solution, strict=True):
        gold = parse(truth, parsing_timeout=_seconds(PARSE_SECONDS))
        if not gold:
            rewards.append(None)
            golds.append("[unparseable]")
            answers.append("[skipped]")
            continue
        answer = _parse_latex(text_of(completion))
        rewards.append(float(_is_same(gold, answer)))
        golds.append(str(gold))
        answers.append(str(answer) if answer else "[unparseable]")
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", golds)
        log_extra("answer_parsed", answers)
    return rewards


@lru_cache(maxsize=1 << 16)
def is_same_mathematics(solution: str, ground_truth: str) -> bool:
    r"""Whether two texts are the same once read as LaTeX: 1/2, 0.5 and \frac{1}{2}, or 1,000 and
    1000.0. A ground truth that is or has a word is no mathematics: letters that multiply would make
    "silent" of "listen", and "no" of "on". A unit in the solution does not count, unless the ground
    truth has letters too: 12 km is not 12 m. Time is limited as in `accuracy_reward`."""
    without_commands = _COMMAND.sub("", ground_truth).strip()
    if _WORD.search(without_commands):
        return False
    has_unit = bool(_LETTER.search(without_commands))
    plain = (_DOLLAR.sub("", text).strip().rstrip(".") for text in (ground_truth, solution))
    gold, answer = (_parse_latex(f"${text}$", True, not has_unit) for text in plain)
    return bool(gold and answer) and _is_same(gold, answer)


def _parse_latex(text: str, without_anchor: bool = False, drops_units: bool = True) -> list:
    """
    Args:
        without_anchor: not only what a box holds or "answer is" announces.
        drops_units: "5 cm" is 5.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    extraction = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=drops_units),
        boxed_match_priority=0,
        try_extract_without_anchor=without_anchor,
    )
    return parse(
        text,
        extraction_config=[extraction],
        extraction_mode="first_match",
        parsing_timeout=_seconds(PARSE_SECONDS),
    )


def _is_same(gold: list, answer: list) -> bool:
    from math_verify import verify

    return verify(gold, answer, timeout_seconds=_seconds(COMPARE_SECONDS))


def _seconds(limit: int) -> int | None:
    """The limit, where signals can keep it."""
    return limit if threading.current_thread() is threading.main_thread() else None
