"""Loads questions with their final answers."""

from dataclasses import dataclass

from grpo_mcore.config import ConfigError, DataConfig
from grpo_mcore.data.order import Order
from grpo_mcore.data.sources import read_source

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


def load_questions(data: DataConfig, key: str, source: str, split: str) -> list[Question]:
    """Reads `source`, the value of setting `key`.

    Raises:
        ConfigError: when it is not there, is empty, lacks a configured column, or has a row whose
            question is not text.
    """
    rows = read_source(key, source, split, data.subset)
    if len(rows) == 0:
        raise ConfigError(f"{key}={source}: the dataset is empty")
    for setting in ("question_column", "answer_column"):
        column = getattr(data, setting)
        if column not in rows.column_names:
            raise ConfigError(
                f"data.{setting}={column}: {source} has no such column; "
                f"it has {', '.join(rows.column_names)}"
            )
    questions = []
    for number, row in enumerate(rows):
        text, answer = row[data.question_column], row[data.answer_column]
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{key}={source}: row {number} has no text in {data.question_column}")
        if answer is None or not final_answer(str(answer)):
            raise ConfigError(f"{key}={source}: row {number} has no answer in {data.answer_column}")
        questions.append(Question(number, text, final_answer(str(answer)), row))
    return questions


def questions_of_step(questions: list[Question], step: int, size: int, seed: int) -> list[Question]:
    """The `size` questions of training step `step` (from 0): epoch after epoch, each in an order
    of its own, so that the data position is the step number."""
    return [questions[number] for number in Order(len(questions), size, seed).rows(step)]
