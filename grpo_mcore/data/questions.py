"""Loads questions with their final answers."""

from dataclasses import dataclass
from typing import Any

from grpo_mcore.config import ConfigError, DataConfig
from grpo_mcore.data.sources import open_dataset
from grpo_mcore.data.text import fill

GROUND_TRUTHS = ("ground_truths", "ground_truth", "answer")
"""Columns that can be the answer, the first there is."""
ANSWER_MARK = "####"
"""In GSM8K's answers the final number follows this mark."""


@dataclass(frozen=True)
class Question:
    """`row` is its number in the source, `columns` the source's own row, `reference` its worked
    answer, "" where it has none; None where the source has none for any."""

    row: int
    text: str
    answer: str
    columns: dict
    reference: str | None = None


def final_answer(text: str) -> str:
    """The final answer in an answer column: what follows `####`, without thousands separators;
    the whole text where there is no mark."""
    if ANSWER_MARK not in text:
        return text.strip()
    return text.rsplit(ANSWER_MARK, 1)[1].strip().replace(",", "")


def reference_answer(question: Question, template: str) -> str:
    """The right answer as a student would write it: the worked one, or where the source has none
    the final answer in the field {answer} of `template`; "" where there is neither."""
    if question.reference is not None:
        return question.reference
    return fill(template, answer=question.answer) if question.answer else ""


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
    reference_column = data.reference_column
    if reference_column is not None and reference_column not in opened.columns:
        raise ConfigError(
            f"data.reference_column={reference_column}: {source if is_named else key} has no such "
            f"column; it has {', '.join(opened.columns)}"
        )
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
        reference = None
        if reference_column is not None:
            reference = "" if row[reference_column] is None else str(row[reference_column]).strip()
        questions.append(Question(number, text, final_answer(str(answer)), row, reference))
    return questions
