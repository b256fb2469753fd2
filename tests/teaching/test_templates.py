"""What questions, students and teachers write reaches the models as it was written, whatever its
braces and signs look like."""

from types import SimpleNamespace

import pytest

from grpo_mcore.config import TeacherGRPOConfig, TemplatesConfig
from grpo_mcore.data.questions import Question, reference_answer
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.rollout.requests import Completion, Generated
from grpo_mcore.teaching.classroom import Classroom
from grpo_mcore.teaching.student import Student

HOSTILE = [
    "{question}",
    "{approach} {teaching} {answer}",
    "{} {0} {0.text} {{question}}",
    "%s %(question)s %d %%",
    "{unbalanced }} {",
    "\\1 \\g<0> $question ${question} #{x}",
]
TEMPLATES = TemplatesConfig(
    baseline="alone: {question} {x} %s",
    diagnostic="plan: {question} {} {",
    adaptive="teach: {question} | {approach} | {0}",
    with_teaching="taught: {question} | {teaching} | }{",
    reference="so {answer} {question}",
)


class Writer:
    """In place of engines, and of a model that scores: notes what is asked, and writes `text`."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self.tokenizer, self.text = tokenizer, text
        self.prompts: list[str] = []
        self.scored: list[tuple[str, str]] = []

    def submit(self, requests) -> SimpleNamespace:
        self.prompts += [self.tokenizer.inner.decode(request.prompt) for request in requests]
        written = [Completion(self.tokenizer.encode(self.text), [], True) for _ in requests]
        return SimpleNamespace(result=lambda: Generated(written, 0.0, 1.0))

    def generate(self, requests) -> list[Completion]:
        return self.submit(requests).result().completions

    def log_likelihoods(self, prompts, completions) -> list[float]:
        both = (map(self.tokenizer.decode, texts) for texts in (prompts, completions))
        self.scored += zip(*both, strict=True)
        return [0.0 for _ in prompts]

    def return_to_device(self) -> None:
        pass


@pytest.mark.seed(22, 23, 24, 25, "A15")
@pytest.mark.parametrize("question", HOSTILE)
@pytest.mark.parametrize("written", HOSTILE)
def test_no_text_is_taken_for_a_field(tiny_models, question, written):
    """Question, approach, teaching and answer, in each of the templates."""
    tokenizer = Tokenizer(str(tiny_models / "qwen2"))
    config = TeacherGRPOConfig(
        templates=TEMPLATES, max_probe_tokens=200, max_completion_length=200, max_answer_tokens=9
    )
    student = Writer(tokenizer, written)
    teacher = Writer(tokenizer, f"hm <teaching>{written}</teaching>")
    asked = Student(student, tokenizer, config, student)
    classroom = Classroom(asked, teacher.generate, tokenizer, config, measures_likelihood=True)
    questions = [Question(0, question, written, {})]

    attempts, _ = classroom.ask_attempts(questions, "key").result()
    guidance = classroom.texts(classroom.guide(attempts, "key", 1, 1.0))
    (lesson,) = classroom.teach(attempts, guidance, "key")

    alone, taught = f"alone: {question} {{x}} %s", f"taught: {question} | {written} | }}{{"
    assert student.prompts == [alone, f"plan: {question} {{}} {{", taught]
    assert teacher.prompts == [f"teach: {question} | {written} | {{0}}"]
    reference = f"so {written} {{question}}"
    assert student.scored == [(alone, reference), (taught, reference)]
    assert lesson.teaching == written and lesson.answer == written


def test_the_right_answer_is_the_worked_one_or_the_final_one_in_a_template():
    assert reference_answer(Question(0, "q", "4", {}), "so {answer}") == "so 4"
    assert reference_answer(Question(0, "q", "4", {}, "2 + 2 = 4"), "so {answer}") == "2 + 2 = 4"
    assert reference_answer(Question(0, "q", "4", {}, ""), "so {answer}") == ""
    assert reference_answer(Question(0, "q", "", {}), "so {answer}") == ""
