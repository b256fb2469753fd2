"""Whether the answer of a completion equals the solution, as math-verify judges."""

import threading
from collections.abc import Callable, Sequence

from grpo_mcore.data.chat import Text
from grpo_mcore.rewards.specs import reward
from grpo_mcore.rewards.text import text_of

PARSE_SECONDS, COMPARE_SECONDS = 10, 5
"""What one answer may take, as in TRL; then it counts as wrong. An answer such as 9^9^9^9 would
take for ever."""


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
    from latex2sympy2_extended import NormalizationConfig  # sympy takes a while to import
    from math_verify import LatexExtractionConfig, parse, verify

    main = threading.current_thread() is threading.main_thread()
    parse_seconds, compare_seconds = (PARSE_SECONDS, COMPARE_SECONDS) if main else (None, None)
    extraction = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    rewards: list[float | None] = []
    golds, answers = [], []
    for completion, truth in zip(completions, solution, strict=True):
        gold = parse(truth, parsing_timeout=parse_seconds)
        if not gold:
            rewards.append(None)
            golds.append("[unparseable]")
            answers.append("[skipped]")
            continue
        answer = parse(
            text_of(completion),
            extraction_config=[extraction],
            extraction_mode="first_match",
            parsing_timeout=parse_seconds,
        )
        rewards.append(float(verify(gold, answer, timeout_seconds=compare_seconds)))
        golds.append(str(gold))
        answers.append(str(answer) if answer else "[unparseable]")
    if log_extra is not None:
        log_extra("solution", list(solution))
        log_extra("gold_parsed", golds)
        log_extra("answer_parsed", answers)
    return rewards
