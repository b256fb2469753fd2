"""What the student is asked, and how the teacher's ranks ask it.

Its engines write; its own model, where one is kept, says meanwhile how likely it finds given
answers after the same prompts.

`Student` runs on the student's ranks. Where those are other ranks than the teacher's, `serve`
answers questions that `RemoteStudent` posts to the mailbox; where they are the same ranks,
`LocalStudent` asks directly. Both hand out a `Pending` answer at once, so that the student can work
while the teacher trains.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from grpo_mcore import device
from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.text import fill
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.errors import ConfigError, PhaseTimeout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Request, RequestError, request_seed

PROBES = 5
"""Sampled for a diagnosis."""
CARRIED = {kind.__name__: kind for kind in (RequestError, ConfigError, EngineError)}
"""Errors that the mailbox carries to the other role, by name; any as the first kind it is of."""


@dataclass(frozen=True)
class StudentWork:
    """Texts the student wrote, and from when to when it worked (seconds since the epoch)."""

    texts: list[str]
    started: float
    finished: float
    log_probs: list[list[float]] = field(default_factory=list)
    """Of each text's tokens, as they were sampled; of `probes` only."""
    log_likelihoods: list[float] = field(default_factory=list)
    """Of the reference answers, one for each question or pair, in nats; empty where there was no
    asking for them."""
    reference_tokens: list[int] = field(default_factory=list)
    """As many, or empty."""
    scoring_seconds: float = 0.0
    """What the log-likelihoods took."""


class Pending(Protocol):
    def result(self) -> StudentWork: ...


@dataclass(frozen=True)
class Finished:
    """An answer that is there already."""

    work: StudentWork

    def result(self) -> StudentWork:
        return self.work


class Asker(Protocol):
    """`attempts` gives all unaided answers, question by question (`baseline_samples` each), then
    one approach for each question. `taught_answers` gives one answer for each pair, `probes` PROBES
    approaches to one question, sampled at temperature 1. `tell` makes something known to processes
    that only carry the student.

    `keys` seed the sampling: one for each question or pair. `references`, as many, are answers
    whose log-likelihoods after the same prompts are wanted too."""

    def attempts(
        self, questions: list[str], keys: list[str], references: list[str] | None = None
    ) -> Pending: ...

    def taught_answers(
        self,
        questions: list[str],
        teachings: list[str],
        keys: list[str],
        references: list[str] | None = None,
    ) -> Pending: ...

    def probes(self, question: str, max_tokens: int, key: str) -> Pending: ...

    def tell(self, answer: Any) -> None: ...

    def close(self) -> None: ...


class ScoringModel(Protocol):
    """The student's own model on the ranks of the engines (`training.likelihood.FrozenModel`)."""

    def log_likelihoods(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[float]: ...

    def leave_device(self) -> None: ...

    def return_to_device(self) -> None: ...


class Student:
    """The frozen student's engines, templates and tokenizer, on the student's ranks; and its model,
    where it is asked for log-likelihoods."""

    shares_device = False
    """With a teacher."""

    def __init__(
        self,
        pool: RolloutPool,
        tokenizer: Tokenizer,
        config: TeacherGRPOConfig,
        model: ScoringModel | None = None,
    ):
        self.pool, self.tokenizer, self.config, self.model = pool, tokenizer, config, model
        offloads = self.shares_device and not config.disable_student_offloading
        self.sleeps = offloads and device.is_cuda()

    def attempts(
        self, questions: list[str], keys: list[str], references: list[str] | None = None
    ) -> Pending:
        templates, config = self.config.templates, self.config
        alone = [
            self._request(
                fill(templates.baseline, question=question),
                config.max_answer_tokens,
                request_seed(config.seed, key, "baseline", sample),
            )
            for question, key in zip(questions, keys, strict=True)
            for sample in range(config.baseline_samples)
        ]
        probes = [
            self._request(
                fill(templates.diagnostic, question=question),
                config.max_probe_tokens,
                request_seed(config.seed, key, "probe"),
            )
            for question, key in zip(questions, keys, strict=True)
        ]
        return self._submit(alone + probes, alone[:: config.baseline_samples], references)

    def taught_answers(
        self,
        questions: list[str],
        teachings: list[str],
        keys: list[str],
        references: list[str] | None = None,
    ) -> Pending:
        config = self.config
        taught = [
            self._request(
                fill(
                    config.templates.with_teaching,
                    question=question,
                    teaching=self.tokenizer.truncate(teaching, config.max_completion_length),
                ),
                config.max_answer_tokens,
                request_seed(config.seed, key, "taught"),
            )
            for question, teaching, key in zip(questions, teachings, keys, strict=True)
        ]
        return self._submit(taught, taught, references)

    def probes(self, question: str, max_tokens: int, key: str) -> Pending:
        prompt = fill(self.config.templates.diagnostic, question=question)
        seeds = [request_seed(self.config.seed, key, "probe", n) for n in range(PROBES)]
        requests = [self._request(prompt, max_tokens, seed, 1.0) for seed in seeds]
        return self._submit(requests, with_log_probs=True)

    def rest(self) -> None:
        """Frees the device memory of engines and a model that share it with a teacher at work."""
        if self.sleeps:
            self.pool.sleep()
            if self.model:
                self.model.leave_device()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The model, if there is one, is off the device meanwhile, and on it afterwards."""
        if self.model:
            self.model.leave_device()
        try:
            yield
        finally:
            if self.model:
                self.model.return_to_device()

    def _request(
        self, prompt: str, max_tokens: int, seed: int, temperature: float | None = None
    ) -> Request:
        if temperature is None:
            temperature = self.config.student_temperature
        return Request(self.tokenizer.encode_prompt(prompt), max_tokens, seed, temperature)

    def _submit(
        self,
        requests: list[Request],
        scored: Sequence[Request] = (),
        references: list[str] | None = None,
        with_log_probs: bool = False,
    ) -> Pending:
        """Has the engines answer `requests`, and the model score `references` after the prompts of
        `scored` while they do."""
        ticket = self.pool.submit(requests)
        found = self._score([request.prompt for request in scored], references)
        if self.sleeps:
            ticket.result()
            self.rest()

        def finish() -> StudentWork:
            generated = ticket.result()
            return replace(
                found,
                texts=[self.tokenizer.decode(c.tokens) for c in generated.completions],
                started=min(generated.started, found.started),
                finished=max(generated.finished, found.finished),
                log_probs=[c.log_probs for c in generated.completions] if with_log_probs else [],
            )

        return _Once(finish)

    def _score(self, prompts: list[list[int]], references: list[str] | None) -> StudentWork:
        """What the model says of the references; it takes no time where there are none."""
        if references is None:
            return StudentWork([], math.inf, 0.0)
        started = time.time()
        self.model.return_to_device()
        completions = [self.tokenizer.encode_completion(text) for text in references]
        found = self.model.log_likelihoods(prompts, completions)
        finished = time.time()
        counts = [len(tokens) for tokens in completions]
        return StudentWork(
            [],
            started,
            finished,
            log_likelihoods=found,
            reference_tokens=counts,
            scoring_seconds=finished - started,
        )


class LocalStudent(Student):
    """Asks the student on this same rank. Its engine works in a process of its own meanwhile; on a
    GPU, whose memory the teacher needs, it works at once and then sleeps."""

    shares_device = True

    def tell(self, answer: Any) -> None:
        """Nobody: every process carries the teacher too."""

    def close(self) -> None:
        """Nothing to tell: the student's engines end with the trainer's."""


class RemoteStudent:
    """Asks the student's ranks through the mailbox, from the teacher's ranks together."""

    def __init__(self, role: Role, mailbox: Mailbox):
        self.role, self.mailbox, self.asked = role, mailbox, 0
        self.silence: EngineError | None = None
        """Why nothing more is expected of the student's ranks."""

    def attempts(self, *arguments) -> Pending:
        return self._ask("attempts", *arguments)

    def taught_answers(self, *arguments) -> Pending:
        return self._ask("taught_answers", *arguments)

    def probes(self, *arguments) -> Pending:
        return self._ask("probes", *arguments)

    def tell(self, answer: Any) -> None:
        self._ask("tell", answer)

    def close(self) -> None:
        """Lets the student's ranks end."""
        self._ask("stop")

    def _ask(self, method: str, *arguments) -> Pending:
        number, self.asked = self.asked, self.asked + 1
        if self.role.rank == 0:
            self.mailbox.post(f"question {number}", [method, arguments])

        def finish() -> StudentWork:
            if self.silence:
                raise self.silence
            try:
                answer = self.mailbox.take(f"answer {number}", "student", self.role)
            except PhaseTimeout as error:  # the teacher can still save what it has learned
                self.silence = EngineError(str(error))
                raise self.silence from error
            return StudentWork(**answer_of(answer))

        return _Once(finish)


def serve(student: Student, role: Role, mailbox: Mailbox, number: int = 0) -> tuple[int, Any]:
    """Answers the teacher's questions in order until it says stop. Runs on the student's ranks.
    Why there is no answer to one is told to the teacher, whose concern it is.

    Args:
        number: of the first question to come.

    Returns:
        That of the next one, and what the teacher told last (None: nothing).
    """
    told = None
    while True:
        method, arguments = mailbox.take(f"question {number}", "teacher", role)
        number += 1
        if method == "stop":
            return number, told
        if method == "tell":
            (told,) = arguments
            continue
        outcome = _outcome_at(student, method, arguments)  # the same on all ranks
        if role.rank == 0:
            mailbox.post(f"answer {number - 1}", outcome)


def _outcome_at(student: Student, method: str, arguments: list) -> dict:
    return outcome_of(lambda: asdict(getattr(student, method)(*arguments).result()))


def outcome_of(ask: Callable[[], Any]) -> dict:
    """What `ask` returns, or which of CARRIED it raises, as JSON."""
    try:
        return {"answer": ask()}
    except tuple(CARRIED.values()) as error:
        name = next(name for name, kind in CARRIED.items() if isinstance(error, kind))
        return {"error": [name, str(error)]}


def answer_of(outcome: dict) -> Any:
    """The answer in what `outcome_of` gave; its error is raised."""
    if "error" in outcome:
        kind, text = outcome["error"]
        raise CARRIED[kind](text)
    return outcome["answer"]


class _Once:
    """A result, or why there is none, found when first asked for."""

    def __init__(self, finish: Callable[[], StudentWork]):
        self.finish, self.work = finish, None
        self.failure: Exception | None = None

    def result(self) -> StudentWork:
        if self.failure:
            raise self.failure
        if self.work is None:
            try:
                self.work = self.finish()
            except tuple(CARRIED.values()) as error:
                self.failure = error
                raise
        return self.work
