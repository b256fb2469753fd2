"""How long roles wait for each other's messages."""

import time
from collections.abc import Callable
from datetime import timedelta
from threading import Thread

import pytest
import torch.distributed as dist

from grpo_mcore.errors import PhaseTimeout
from grpo_mcore.parallel import world
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.teaching.student import RemoteStudent

DEADLINE = 1.5


class OneRank:
    """Stands in for a role; counts its collectives."""

    def __init__(self):
        self.rank, self.rounds = 0, 0

    def once(self, function: Callable):
        self.rounds += 1
        return function()


@pytest.fixture
def mailboxes(monkeypatch) -> tuple[Mailbox, Mailbox]:
    """The waiting role's, and the other's."""
    monkeypatch.setattr(world, "ROUND_SECONDS", 0.2)
    patience = {"timeout": timedelta(seconds=60), "wait_for_workers": False}
    first = dist.TCPStore("127.0.0.1", 0, is_master=True, **patience)
    second = dist.TCPStore("127.0.0.1", first.port, is_master=False, **patience)
    return Mailbox(first, DEADLINE), Mailbox(second, DEADLINE)


def test_heartbeats_renew_the_deadline(mailboxes):
    """The other ranks of the waiting role hear of each round."""
    mine, theirs = mailboxes

    def work() -> None:
        for _ in range(20):
            time.sleep(0.2)
            theirs.beat("student")
        theirs.post("answer 0", ["late"])

    role, worker = OneRank(), Thread(target=work)
    worker.start()
    assert mine.take("answer 0", "student", role) == ["late"]
    worker.join()
    assert role.rounds > 3


def test_nothing_is_a_message_too(mailboxes):
    mine, theirs = mailboxes
    theirs.post("answer 0", None)
    assert mine.take("answer 0", "student", OneRank()) is None


def test_silence_is_an_end(mailboxes):
    mine, theirs = mailboxes
    theirs.beat("teacher")
    with pytest.raises(PhaseTimeout, match="heard nothing of the student for 2 s while waiting"):
        mine.take("answer 0", "student", OneRank())


def test_a_silent_student_is_an_engines_failure(mailboxes):
    """Which saves what was learned; nobody waits for it a second time."""
    role = OneRank()
    student = RemoteStudent(role, mailboxes[0])
    asked = [student.attempts(["q"], ["k"]) for _ in range(2)]
    with pytest.raises(EngineError, match="heard nothing of the student"):
        asked[0].result()
    rounds = role.rounds
    with pytest.raises(EngineError, match="heard nothing of the student"):
        asked[1].result()
    assert role.rounds == rounds
