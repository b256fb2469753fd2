"""How often `leaks_answer` finds the answer in teachings made of GSM8K's worked answers.

    python tools/leak_rates.py train.jsonl

Three teachings of each row: the whole worked answer, which leaks; its lines in front of the first
that has the final number in digits, which do not; and the whole worked answer of the next row,
which has nothing to do with the question.
"""

import json
import re
import sys
from pathlib import Path

from grpo_mcore.rewards import leaks_answer
from grpo_mcore.rewards.leak import numbers_in

_ANNOTATION = re.compile(r"<<.*?>>")
_DIGITS = re.compile(r"\d[\d,]*(?:\.\d+)?|\.\d+")


def rates(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """For each kind of teaching: how many are found to leak, of how many.

    Args:
        rows: with "question", and with "answer" as GSM8K has it: lines, then "#### 42".
    """
    worked = [_ANNOTATION.sub("", row["answer"]).partition("####") for row in rows]
    found: dict[str, list[bool]] = {
        "whole, answer not in question": [],
        "whole, answer in question": [],
        "lines before the answer": [],
        "of another question": [],
    }
    for number, (row, (whole, _, answer)) in enumerate(zip(rows, worked, strict=True)):
        question, answer = row["question"], answer.strip()

        def leaks(teaching: str, question=question, answer=answer) -> bool:
            return leaks_answer(teaching, question, answer)

        is_held = numbers_in(answer) <= numbers_in(question, least_spelled=0)
        found[f"whole, answer {'' if is_held else 'not '}in question"].append(leaks(whole))
        if before := _lines_before(whole, float(answer.replace(",", ""))):
            found["lines before the answer"].append(leaks(before))
        found["of another question"].append(leaks(worked[number - 1][0]))
    return {kind: (sum(each), len(each)) for kind, each in found.items()}


def _lines_before(whole: str, answer: float) -> str:
    lines = whole.splitlines()
    for number, line in enumerate(lines):
        if abs(answer) in (float(digits.replace(",", "")) for digits in _DIGITS.findall(line)):
            return "\n".join(lines[:number])
    return whole


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().splitlines()
    for kind, (leaking, count) in rates([json.loads(line) for line in lines]).items():
        print(f"{kind:32s}{leaking:6d} of {count:5d}  {leaking / max(count, 1):6.1%}")
