"""Loads questions with their final answers."""

from dataclasses import dataclass
from typing import Any

from grpo_mcore.config import ConfigError, DataConfig
from grpo_mcore.data.sources import open_dataset

GROUND_TRUTHS = ("ground_truths", "ground_truth", "answer")
"""Columns that can be the answer, the first there is."""
ANSWER_MARK = "####"
"""In GSM8K's answers the final number follows this mark."""


@dataclass(frozen=True)
class Question:
    """`row` is its number in the source, `columns` the source's own row."""

    row: int
    text: str
    answer: str
    columns: dict


def final_answer(text: str) -> str:
    """The final answer in an answer column: what follows `####`, without thousands separators;
    the whole text where there is no mark."""
    if ANSWER_MARK not in text:
        return text.strip()
    return text.rsplit(ANSWER_MARK, 1)[1].strip().replace(",", "")


def load_questions(data: DataConfig, key: str, source: Any, split: str) -> list[Question]:
    """Reads `source`, the value of setting `key`: a file, the name of a dataset, or a dataset; in
    one the question may also be in a column `prompt`, and the answer in one of GROUND_TRUTHS.

    Raises:
        ConfigError: when it is not there, is empty, lacks a configured column, or has a row whose
            question is not text.
    """
    opened = open_dataset(key, source, split, data.subset)
    is_named = isinstance(source, str)
    if opened.size is None:
        raise ConfigError(f"{opened.name}: is a stream; teaching wants a dataset of known length")
    columns = []
    for setting, others in (("question_column", ("prompt",)), ("answer_column", GROUND_TRUTHS)):
        column = getattr(data, setting)
        names = [column] if is_named else [column, *others]
        found = next((name for name in names if name in opened.columns), None)
        if found is None:
            raise ConfigError(
                f"data.{setting}={column}: {source if is_named else key} has no such column; "
                f"it has {', '.join(opened.columns)}"
            )
        columns.append(found)
    question_column, answer_column = columns
    questions = []
    for number in range(opened.size):
        row = opened[number]
        text, answer = row[question_column], row[answer_column]
        if isinstance(text, list) and text:
            text = text[-1].get("content")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{opened.name}: row {number} has no text in {question_column}")
        if answer is None or not final_answer(str(answer)):
            raise ConfigError(f"{opened.name}: row {number} has no answer in {answer_column}")
        questions.append(Question(number, text, final_answer(str(answer)), row))
    return questions
