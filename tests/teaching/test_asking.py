"""The teacher's ranks ask a student on ranks of its own."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.data.tokenizer import Tokenizer
from grpo_mcore.errors import KnownError
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import StaleEngine
from grpo_mcore.rollout.requests import Completion, Generated, RequestError, check_requests
from grpo_mcore.teaching.student import (
    RemoteStudent,
    Student,
    StudentWork,
    answer_of,
    outcome_of,
    serve,
)
from grpo_mcore.weights.sync import SyncError

DEADLINE = 20.0


class Pool:
    """In place of engines for sequences of 40 tokens, which fail where a token is 13."""

    def __init__(self, tokenizer: Tokenizer):
        self.text = tokenizer.encode("add")

    def submit(self, requests) -> SimpleNamespace:
        check_requests("student", requests, 40)

        def result() -> Generated:
            if any(13 in request.prompt for request in requests):
                raise EngineError("engine student-0 died")
            return Generated([Completion(self.text, [], True) for _ in requests], 0.0, 1.0)

        return SimpleNamespace(result=result)


@pytest.fixture
def mailboxes() -> list[Mailbox]:
    """The teacher's and the student's."""
    patience = {"timeout": timedelta(seconds=60), "wait_for_workers": False}
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, **patience)
    second = dist.TCPStore("127.0.0.1", first.port, is_master=False, **patience)
    return [Mailbox(store, DEADLINE) for store in (first, second)]


def test_why_there_is_no_answer_comes_back_and_the_student_works_on(mailboxes, tiny_models):
    tokenizer = Tokenizer(str(tiny_models / "qwen2"))
    config = TeacherGRPOConfig(max_answer_tokens=8)
    config.templates.with_teaching = "{question} {teaching}"
    student = Student(Pool(tokenizer), tokenizer, config)
    role = SimpleNamespace(rank=0, once=lambda function: function())
    bad = tokenizer.decode([13])
    assert 13 in tokenizer.encode_prompt(bad)
    with ThreadPoolExecutor() as thread:
        served = thread.submit(serve, student, role, mailboxes[1])
        asker = RemoteStudent(role, mailboxes[0])
        too_long, broken, short = [
            asker.taught_answers([question], ["sum"], ["k"])
            for question in ("tom " * 60, bad, "tom")
        ]
        for _ in range(2):  # the answer comes once
            with pytest.raises(RequestError, match="student: request 0 has"):
                too_long.result()
        with pytest.raises(EngineError, match="engine student-0 died"):
            broken.result()
        assert short.result() == StudentWork([tokenizer.decode(student.pool.text)], 0.0, 1.0)
        asker.tell({"answer": None})
        asker.close()
        number, told = served.result()
    assert number == 5 and answer_of(told) is None


def test_what_the_teacher_cannot_do_is_told_as_the_error_it_is(mailboxes):
    role = SimpleNamespace(rank=0, once=lambda function: function())
    asker = RemoteStudent(role, mailboxes[0])
    asker.tell({"error": ["ConfigError", "task: too long"]})
    asker.close()
    _, told = serve(None, role, mailboxes[1])
    with pytest.raises(ConfigError, match="task: too long"):
        answer_of(told)


@pytest.mark.parametrize(
    "kind, told",
    [
        (ConfigError, ConfigError),
        (RequestError, RequestError),
        (EngineError, EngineError),
        (StaleEngine, EngineError),
        (SyncError, EngineError),
    ],
)
def test_whatever_engines_fail_by_comes_back(kind, told):
    def ask():
        raise kind("student: why")

    with pytest.raises(KnownError) as raised:
        answer_of(outcome_of(ask))
    assert type(raised.value) is told and str(raised.value) == "student: why"
