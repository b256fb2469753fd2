"""A teacher's engines and a student together: attempts, guidance, lessons, evaluation.

Every method is called by all ranks of the teacher, with the same arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.questions import Question, reference_answer
from grpo_mcore.data.text import extract_teaching, fill
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.rewards import Grader
from grpo_mcore.rollout.requests import Completion, Request, request_seed
from grpo_mcore.teaching.lesson import Attempt, Lesson, collect_attempts
from grpo_mcore.teaching.student import Asker, Finished, Pending, StudentWork


@dataclass(frozen=True)
class Guidance:
    """A sampled guidance with the adaptive prompt it came from."""

    prompt: list[int]
    completion: Completion


def grader_of(config: TeacherGRPOConfig) -> Grader:
    return Grader(config.extraction, config.answer_match)


@dataclass(frozen=True)
class PendingAttempts:
    """Attempts the student was asked for, with what it was to say of the right answers
    (`references`)."""

    questions: list[Question]
    references: list[str] | None
    pending: Pending
    config: TeacherGRPOConfig

    def result(self) -> tuple[list[Attempt], StudentWork]:
        work = self.pending.result()
        samples, grader = self.config.baseline_samples, grader_of(self.config)
        return collect_attempts(self.questions, work, samples, grader), work

    def record(self) -> dict:
        """The attempts as JSON, once they are there."""
        return {
            "questions": [question.text for question in self.questions],
            "references": self.references,
            "work": asdict(self.pending.result()),
        }


class Classroom:
    """`key` arguments seed the sampling: the same key gives the same text."""

    def __init__(
        self,
        student: Asker,
        teacher: Callable[[list[Request]], list[Completion]],
        tokenizer: Tokenizer,
        config: TeacherGRPOConfig,
        measures_likelihood: bool = False,
    ):
        """
        Args:
            teacher: gives one completion a request, in order.
            measures_likelihood: ask the student too how likely it finds the right answers.
        """
        self.measures_likelihood = measures_likelihood
        self.scoring_seconds = 0.0
        """What the newest taught answers' log-likelihoods took the student."""
        self.student, self.teacher = student, teacher
        self.tokenizer, self.config = tokenizer, config

    def ask_attempts(self, questions: list[Question], key: str) -> PendingAttempts:
        """Asks the student for unaided answers and an approach for each question, and does not
        wait: they do not depend on the teacher."""
        references = self._references(questions)
        pending = self.student.attempts(
            [q.text for q in questions], [f"{key}/{i}" for i in range(len(questions))], references
        )
        return PendingAttempts(questions, references, pending, self.config)

    def recall_attempts(self, questions: list[Question], record: dict) -> PendingAttempts | None:
        """The attempts in `record`; None if they are not those of `questions`."""
        references = self._references(questions)
        asked = record["questions"], record["references"]
        if asked != ([question.text for question in questions], references):
            return None
        finished = Finished(StudentWork(**record["work"]))
        return PendingAttempts(questions, references, finished, self.config)

    def guide(
        self, attempts: list[Attempt], key: str, copies: int, temperature: float
    ) -> list[Guidance]:
        """`copies` guidances for each attempt, side by side."""
        config = self.config
        prompts = [self.adaptive_prompt(a) for a in attempts for _ in range(copies)]
        greedy = temperature == 0
        completions = self.teacher(
            [
                Request(
                    prompt,
                    config.max_completion_length,
                    request_seed(config.seed, key, i, "guidance"),
                    temperature,
                    1.0 if greedy else config.top_p,
                    0 if greedy else config.top_k,
                    0.0 if greedy else config.min_p or 0.0,
                    config.repetition_penalty,
                    config.stop or (),
                    config.bad_words or (),
                    config.structured_outputs,
                )
                for i, prompt in enumerate(prompts)
            ]
        )
        return [Guidance(*pair) for pair in zip(prompts, completions, strict=True)]

    def adaptive_prompt(self, attempt: Attempt) -> list[int]:
        """The teacher's prompt: the question with the student's approach."""
        approach = self.tokenizer.truncate(attempt.approach, self.config.max_probe_tokens)
        text = fill(
            self.config.templates.adaptive, question=attempt.question.text, approach=approach
        )
        return self.tokenizer.encode_prompt(text)

    def texts(self, guidance: Sequence[Guidance]) -> list[str]:
        return [self.tokenizer.decode(g.completion.tokens) for g in guidance]

    def teach(self, attempts: list[Attempt], texts: list[str], key: str) -> list[Lesson]:
        """Lets the student answer with each guidance text; an attempt's lie side by side."""
        each = len(texts) // len(attempts)
        given = [attempts[i // each] for i in range(len(texts))]
        teachings = [extract_teaching(text) for text in texts]
        work = self.student.taught_answers(
            [a.question.text for a in given],
            teachings,
            [f"{key}/{i}" for i in range(len(texts))],
            self._references([a.question for a in given]),
        ).result()
        self.scoring_seconds = work.scoring_seconds
        found = work.log_likelihoods or [None] * len(texts)
        return [
            Lesson(attempt, text, len(self.tokenizer.encode(teaching)), answer, log_likelihood)
            for attempt, text, teaching, answer, log_likelihood in zip(
                given, texts, teachings, work.texts, found, strict=True
            )
        ]

    def evaluate(self, attempts: list[Attempt], key: str) -> dict[str, list[Lesson]]:
        """Teaches each attempt once with guidance "sampled" at temperature 1 and once with "greedy"
        guidance."""
        lessons = {}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            texts = self.texts(self.guide(attempts, key, 1, temperature))
            lessons[name] = self.teach(attempts, texts, key)
        return lessons

    def _references(self, questions: list[Question]) -> list[str] | None:
        if not self.measures_likelihood:
            return None
        return [reference_answer(q, self.config.templates.reference) for q in questions]
