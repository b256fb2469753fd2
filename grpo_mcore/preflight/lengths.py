"""Whether every question fits the models' contexts, whatever the models write."""

from dataclasses import dataclass

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.data.questions import Question, reference_answer
from grpo_mcore.data.text import fill
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.models.shape import ModelShape

JOINTS = 2
"""Tokens more than those of its parts a filled template may have: they may split otherwise."""


@dataclass(frozen=True)
class Lengths:
    """Longest sequence, prompt and completion, that an engine can meet."""

    teacher: int
    student: int


def fit_lengths(
    config: TeacherGRPOConfig,
    key: str,
    questions: list[Question],
    shapes: dict[str, ModelShape],
    tokenizers: dict[str, Tokenizer],
) -> tuple[list[Question], int, tuple[int, int]]:
    """Finds questions whose longest possible sequence exceeds a model's context.

    Returns:
        The questions kept, how many were dropped, and the longest (teacher, student) sequence.
    """
    kept, longest = [], (0, 0)
    for question in questions:
        needs = _sequence_lengths(config, question.text, tokenizers)
        excess = [
            f"{role}.path's context of {shapes[role].positions} tokens is less than the "
            f"{need} that prompt and completion may need"
            for role, need in needs.items()
            if need > shapes[role].positions
        ]
        if excess and config.data.overlong == "error":
            raise ConfigError(
                f"{key}: row {question.row} is too long: {excess[0]}; shorten it, lower the "
                "max_*_tokens settings, or set data.overlong=drop"
            )
        if not excess:
            kept.append(question)
            longest = (max(longest[0], needs["teacher"]), max(longest[1], needs["student"]))
    return kept, len(questions) - len(kept), longest


def _sequence_lengths(
    config: TeacherGRPOConfig, question: str, tokenizers: dict[str, Tokenizer]
) -> dict[str, int]:
    """The most tokens each model may have to hold for `question`. Text that one model writes for
    another is cut to the writer's limit in the reader's tokens, which bounds it here."""
    templates = config.templates

    def prompt(role: str, template: str, **fields: str) -> int:
        return len(tokenizers[role].encode_prompt(fill(template, question=question, **fields)))

    return {
        "teacher": prompt("teacher", templates.adaptive, approach="")
        + config.max_probe_tokens
        + config.max_completion_length
        + JOINTS,
        "student": max(
            prompt("student", templates.baseline) + config.max_answer_tokens,
            prompt("student", templates.diagnostic) + config.max_probe_tokens,
            prompt("student", templates.with_teaching, teaching="")
            + config.max_completion_length
            + config.max_answer_tokens
            + JOINTS,
        ),
    }


def check_references(
    config: TeacherGRPOConfig, questions: list[Question], shape: ModelShape, tokenizer: Tokenizer
) -> None:
    """Checks that the student has room for each right answer after the longer of the prompts, alone
    and taught, with its question.

    Raises:
        ConfigError: for the first question whose answer is too long.
    """
    room = shape.positions
    templates = config.templates
    for question in questions:
        alone = fill(templates.baseline, question=question.text)
        taught = fill(templates.with_teaching, question=question.text, teaching="")
        reference = reference_answer(question, templates.reference)
        need = len(tokenizer.encode_completion(reference)) + max(
            len(tokenizer.encode_prompt(alone)),
            len(tokenizer.encode_prompt(taught)) + config.max_completion_length + JOINTS,
        )
        if need > room:
            raise ConfigError(
                f"data.reference_column={config.data.reference_column}: with the reference of row "
                f"{question.row} student.path's context of {room} tokens is less than the {need} "
                "that a prompt and it may need; shorten it, or lower max_completion_length"
            )
