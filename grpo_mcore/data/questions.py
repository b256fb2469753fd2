"""Loads questions with their final answers."""

import random
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore.config import ConfigError, DataConfig

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
    from datasets import Dataset, disable_progress_bars, load_dataset

    disable_progress_bars()  # every rank reads the data

    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    kind = kinds.get(Path(source).suffix)
    if kind and not Path(source).is_file():
        raise ConfigError(f"{key}={source}: no such file")
    if kind and Path(source).stat().st_size == 0:
        raise ConfigError(f"{key}={source}: the dataset is empty")
    try:
        if kind:
            rows = getattr(Dataset, f"from_{kind}")(source)
        else:
            rows = load_dataset(source, data.subset, split=split)
    except Exception as error:  # format, hub, network and naming errors have no common type
        cause = error.__cause__ or error
        what = (
            "cannot be read"
            if kind
            else ("neither a .jsonl, .json or .parquet file nor a dataset that loads")
        )
        raise ConfigError(
            f"{key}={source}: {what} ({type(cause).__name__}: {' '.join(str(cause).split())})"
        ) from error
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
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(questions))
        chosen.append(questions[_order(len(questions), seed, epoch)[place]])
    return chosen


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(size: int, seed: int, epoch: int) -> list[int]:
    key = (size, seed, epoch)
    if key not in _orders:
        _orders.clear()  # one epoch at a time is enough
        order = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        _orders[key] = order
    return _orders[key]
