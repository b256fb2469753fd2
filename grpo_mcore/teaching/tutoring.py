"""One task at a time: what the student can do with it, and guidance that follows from that."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.data.text import extract_teaching, fill
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.rollout.requests import Completion, Request, request_seed
from grpo_mcore.teaching.diagnosis import (
    GRADE,
    REPORT,
    DiagnosticResult,
    Grading,
    diagnose,
    read_gaps,
    typical,
)
from grpo_mcore.teaching.student import Asker

KEY = "tutoring"
"""Of the sampling's seeds: the same task is probed with the same ones every time."""
GRADES_EACH = 4
"""Grades sampled for each probe."""
REPORT_TOKENS = 128
LEAST_GUIDANCE = 10


class TutoringMethods(ABC):
    """`diagnostic_probe` and `generate_guidance` (ATLAS, "Trainers")."""

    @abstractmethod
    def _ask_tutor(self, ask: Callable[["Tutoring"], Any]) -> Any:
        """What `ask` finds, as JSON, on every process."""

    def diagnostic_probe(self, task: str, max_tokens: int = 50) -> DiagnosticResult:
        """What the student can do with `task`.

        Args:
            max_tokens: of each probe; fewer where its engine has no room for as many.

        Raises:
            ValueError: for a task that is empty or too long, or `max_tokens` below 1.
            TypeError: for a task that is no text.
            RuntimeError: when engines fail.
        """
        check_task(task)
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: must be at least 1")
        return DiagnosticResult(
            **self._ask_tutor(lambda tutoring: asdict(tutoring.diagnose(task, max_tokens)))
        )

    def generate_guidance(
        self, task: str, diagnostic: DiagnosticResult, max_tokens: int = 200
    ) -> str:
        """Guidance for the student: a walkthrough for a capability below 0.3, a verification above
        0.7, hints between. The same arguments give the same text.

        Args:
            diagnostic: of this task, or one much like it.
            max_tokens: of all the teacher writes; fewer where its engine has no room for as many.

        Raises:
            ValueError: for a task that is empty or too long, no diagnostic, or `max_tokens` below
                10.
            TypeError: for a task that is no text.
            RuntimeError: when engines fail.
        """
        check_task(task)
        if diagnostic is None:
            raise ConfigError("diagnostic=None: give what diagnostic_probe returned")
        if max_tokens < LEAST_GUIDANCE:
            raise ConfigError(f"max_tokens={max_tokens}: must be at least {LEAST_GUIDANCE}")
        return self._ask_tutor(lambda tutoring: tutoring.guide(task, diagnostic, max_tokens))


def check_task(task: str) -> None:
    """
    Raises:
        TypeError: when it is no text.
        ConfigError: when it is empty.
    """
    if not isinstance(task, str):
        raise TypeError(f"task={task!r}: must be text")
    if not task.strip():
        raise ConfigError(f"task={task!r}: is empty")


class Tutoring:
    """A teacher's engines and a student, for one task at a time. Every method is called by all
    ranks of the teacher, with the same arguments."""

    def __init__(
        self,
        student: Asker,
        teacher: Callable[[list[Request]], list[Completion]],
        tokenizers: dict[str, Tokenizer],
        config: TeacherGRPOConfig,
        max_model_len: dict[str, int],
    ):
        """
        Args:
            teacher: gives one completion a request, in order; obeys `structured_outputs`.
            tokenizers, max_model_len: of "teacher" and "student".
        """
        self.student, self.teacher, self.config = student, teacher, config
        self.tokenizers, self.max_model_len = tokenizers, max_model_len

    def diagnose(self, task: str, max_tokens: int) -> DiagnosticResult:
        """
        Raises:
            ConfigError: when the task leaves an engine no room for a completion.
        """
        prompt = self.tokenizers["student"].encode_prompt(
            fill(self.config.templates.diagnostic, question=task)
        )
        room = self._room("student", "diagnostic", prompt)
        self._prompt("grading", task, approach="")  # a task too long for it costs no probes
        work = self.student.probes(task, min(max_tokens, room), KEY).result()
        prompts = [self._prompt("grading", task, approach=text) for text in work.texts]
        requests = [
            self._graded(prompt, GRADE, 1, 1.0, number, sample)
            for number, prompt in enumerate(prompts)
            for sample in range(GRADES_EACH)
        ]
        prompt = self._prompt("grading", task, approach=typical(work.texts))
        tokens = min(REPORT_TOKENS, self._room("teacher", "grading", prompt))
        report = self._graded(prompt, REPORT, tokens, 0.0, "report")
        *grades, last = self.teacher([*requests, report])
        gradings = [
            Grading(dict(map(self._read_grade, grades[first : first + GRADES_EACH])))
            for first in range(0, len(grades), GRADES_EACH)
        ]
        gaps = read_gaps(self.tokenizers["teacher"].decode(last.tokens), last.finished)
        return diagnose(work.texts, work.log_probs, gradings, gaps)

    def guide(self, task: str, diagnosis: DiagnosticResult, max_tokens: int) -> str:
        """What the student shall read.

        Raises:
            ConfigError: when the task leaves the engine no room for a completion.
        """
        config, form = self.config, diagnosis.guidance_form
        gaps = "\n".join(f"- {gap}" for gap in diagnosis.identified_gaps) or "-"
        prompt = self._prompt(form, task, approach=diagnosis.approach, gaps=gaps)
        request = Request(
            prompt,
            min(max_tokens, self._room("teacher", form, prompt)),
            request_seed(config.seed, KEY, "guidance"),
            temperature=0.0,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop or (),
            bad_words=config.bad_words or (),
            structured_outputs=config.structured_outputs,
        )
        (completion,) = self.teacher([request])
        return extract_teaching(self.tokenizers["teacher"].decode(completion.tokens))

    def _graded(
        self, prompt: list[int], form: str, max_tokens: int, temperature: float, *key: int | str
    ) -> Request:
        seed = request_seed(self.config.seed, KEY, "grade", *key)
        structure = {"regex": form}
        return Request(prompt, max_tokens, seed, temperature, structured_outputs=structure)

    def _read_grade(self, completion: Completion) -> tuple[int, float]:
        """A grade and its probability among all grades: the structure leaves no other tokens in."""
        grade = int(self.tokenizers["teacher"].decode(completion.tokens))
        return grade, math.exp(sum(completion.log_probs))

    def _prompt(self, template: str, task: str, **written: str) -> list[int]:
        """The teacher's, with what models have `written`: of each at most what fills half of the
        room that is left, so that there is some for a completion."""
        tokenizer, fields = self.tokenizers["teacher"], dict.fromkeys(written, "")

        def encode() -> list[int]:
            text = fill(getattr(self.config.templates, template), question=task, **fields)
            return tokenizer.encode_prompt(text)

        for name, text in written.items():
            fields[name] = tokenizer.truncate(text, self._room("teacher", template, encode()) // 2)
        prompt = encode()
        self._room("teacher", template, prompt)
        return prompt

    def _room(self, role: str, template: str, prompt: list[int]) -> int:
        """Tokens of a completion that the engine has room for after `prompt`."""
        room = self.max_model_len[role] - len(prompt)
        if room < 1:
            raise ConfigError(
                f"task: with templates.{template} it makes a prompt of {len(prompt)} tokens; the "
                f"{role}'s engine takes {self.max_model_len[role]}, completion included"
            )
        return room
