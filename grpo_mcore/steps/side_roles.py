"""Roles beside the one that trains: a frozen student's ranks, and the run's own judge."""

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.parallel.world import World
from grpo_mcore.rewards import RewardSource
from grpo_mcore.rewards.rim import Endpoint, asking_own_judge
from grpo_mcore.rollout.judge_server import JudgeServer
from grpo_mcore.steps.session import Attendance
from grpo_mcore.teaching.student import Student, serve

ADDRESS = "where the judge is"
LOOPBACK = "127.0.0.1"


class StudentAttendance(Attendance):
    """Processes that carry only the student."""

    def __init__(self, student: Student, world: World):
        self.student, self.world, self.answered = student, world, 0
        self.told: Any = None
        """By the teacher's processes, when last served."""

    def serve(self) -> None:
        role, mailbox = self.world.roles["student"], self.world.mailbox
        self.answered, self.told = serve(self.student, role, mailbox, self.answered)


class JudgeAttendance(Attendance):
    """Processes that carry only the judge, whose server rank 0 keeps alive."""

    def __init__(self, config: TeacherGRPOConfig, world: World, cleanup: ExitStack):
        """
        Raises:
            EngineError: when the server does not start.
        """
        self.role, self.mailbox, self.served = world.roles["judge"], world.mailbox, 0

        def open_server() -> None:
            server = JudgeServer(config.judge, config.rollout, _own_address(), _log(config))
            cleanup.callback(server.close)
            server.wait_until_ready(lambda: self.mailbox.beat("judge"))
            self.mailbox.post(ADDRESS, asdict(Endpoint(server.base_url, None, server.api_key)))

        self.role.once(open_server)

    def serve(self) -> None:
        self.mailbox.take(_rest(self.served), "teacher", self.role)
        self.served += 1


class JudgeLink:
    """The judge, on the teacher's ranks, of which rank 0 starts it where roles are colocated."""

    def __init__(self, config: TeacherGRPOConfig, world: World, cleanup: ExitStack):
        self.role, self.mailbox, self.rests = world.roles["teacher"], world.mailbox, 0
        self.server: JudgeServer | None = None
        if self.mailbox is None and self.role.rank == 0:
            self.server = JudgeServer(config.judge, config.rollout, LOOPBACK, _log(config))
            cleanup.callback(self.server.close)

    def tell(self, sources: Sequence[RewardSource]) -> None:
        """Waits for the judge and tells the rewards that ask it where it is.

        Raises:
            EngineError: when a colocated one does not start.
            PhaseTimeout: when nothing is heard of one on ranks of its own.
        """
        if self.mailbox:
            endpoint = Endpoint(**self.mailbox.take(ADDRESS, "judge", self.role))
        else:
            endpoint = self.role.once(self._await_server)
        for source in asking_own_judge(sources):
            source.own_judge = endpoint

    def rest(self) -> None:
        """Lets the judge's ranks end."""
        if self.mailbox and self.role.rank == 0:
            self.mailbox.post(_rest(self.rests), "rest")
        self.rests += 1

    def _await_server(self) -> Endpoint:
        self.server.wait_until_ready(lambda: None)
        return Endpoint(self.server.base_url, None, self.server.api_key)


def _log(config: TeacherGRPOConfig) -> Path:
    return Path(config.output_dir) / "logs" / "judge.log"


def _rest(number: int) -> str:
    return f"rest {number} of the judge"


def _own_address() -> str:
    """The address at which the teacher's first rank, on the rendezvous' host, reaches this one."""
    if os.environ["WORLD_SIZE"] == os.environ.get("LOCAL_WORLD_SIZE"):
        return LOOPBACK
    with socket.create_connection(
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    ) as connection:
        return connection.getsockname()[0]
