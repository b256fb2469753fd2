"""What a teacher is asked about one task."""

from types import SimpleNamespace

import pytest

from grpo_mcore.config import ConfigError, TeacherGRPOConfig, TemplatesConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.rollout.requests import Completion, Request, check_requests
from grpo_mcore.teaching.diagnosis import GRADE, GRADES, REPORT, DiagnosticResult
from grpo_mcore.teaching.student import Finished, StudentWork
from grpo_mcore.teaching.tutoring import GRADES_EACH, Tutoring

CONTEXT = 64
TEMPLATES = TemplatesConfig(
    diagnostic="plan {question}",
    grading="grade {question}: {approach}",
    hints="hint {question}: {approach} {gaps}",
)
SKETCH = "add " * 10


@pytest.fixture
def tokenizer(tiny_models) -> Tokenizer:
    return Tokenizer(str(tiny_models / "qwen2"))


def tutoring(tokenizer: Tokenizer, asked: list[Request], sketch: str = SKETCH) -> Tutoring:
    """Of a student that always plans `sketch`, and a teacher that gives 3 for each plan and notes
    what it is asked."""

    def teacher(requests: list[Request]) -> list[Completion]:
        check_requests("teacher", requests, CONTEXT)
        asked.extend(requests)
        return [Completion(tokenizer.encode("3"), [-1.0], True) for _ in requests]

    work = StudentWork([sketch] * 5, 0.0, 1.0, [[-1.0]] * 5)
    student = SimpleNamespace(probes=lambda *_: Finished(work))
    config = TeacherGRPOConfig(templates=TEMPLATES, max_probe_tokens=2)
    roles = ("teacher", "student")
    lengths = dict.fromkeys(roles, CONTEXT)
    return Tutoring(student, teacher, dict.fromkeys(roles, tokenizer), config, lengths)


def test_a_grade_is_one_of_five_and_the_report_says_what_lacks(tokenizer):
    asked = []
    found = tutoring(tokenizer, asked).diagnose("tom", 50)
    *grades, report = asked
    assert len(grades) == 5 * GRADES_EACH
    assert all(r.structured_outputs == {"regex": GRADE} and r.max_tokens == 1 for r in grades)
    assert report.structured_outputs == {"regex": REPORT} and report.temperature == 0
    assert found.response_quality["grade"] == (3 - GRADES[0]) / (GRADES[-1] - GRADES[0])


def test_the_whole_sketch_is_graded_however_short_those_of_training_are(tokenizer):
    asked = []
    tutor = tutoring(tokenizer, asked)
    tutor.guide("tom", tutor.diagnose("tom", 50), 10)
    assert all(SKETCH in tokenizer.decode(request.prompt) for request in asked)


def test_what_models_wrote_is_cut_so_that_there_is_room_to_answer(tokenizer):
    asked, endless = [], "add " * 500
    tutor = tutoring(tokenizer, asked, endless)
    found = tutor.diagnose("tom", 50)
    assert found.approach == endless
    tutor.guide("tom", DiagnosticResult(0.5, approach=endless, identified_gaps=[endless]), 200)
    *_, report, guidance = asked
    for request in (report, guidance):
        assert len(request.prompt) + request.max_tokens == CONTEXT
        assert request.max_tokens >= 10
        assert "add add" in tokenizer.decode(request.prompt)


def test_a_task_too_long_for_the_teacher_costs_no_probes(tokenizer):
    tutor = tutoring(tokenizer, [])
    tutor.max_model_len["student"] = 10 * CONTEXT
    tutor.student = None
    with pytest.raises(ConfigError, match=r"task: with templates\.grading it makes a prompt of"):
        tutor.diagnose("tom " * 60, 50)
