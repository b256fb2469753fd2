"""The run's own judge: where it runs, and who is told of it."""

import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.parallel.world import World
from grpo_mcore.rewards import RewardSource
from grpo_mcore.rewards.rim import Endpoint, RIMReward
from grpo_mcore.rollout.judge_server import JudgeServer
from grpo_mcore.trainers.base import Attendance

ADDRESS = "where the judge is"
LOOPBACK = "127.0.0.1"


def check_judge_used(sources: Sequence[RewardSource], path: str | None = None) -> None:
    """
    Args:
        path: of the run's own judge.

    Raises:
        ConfigError: for rewards without their judge, or a judge without rewards.
    """
    waiting = _waiting(sources)
    if waiting and path is None:
        raise ConfigError(
            "reward_system.small.base_url=None: give the URL of an OpenAI-compatible endpoint, or "
            "judge.path for a judge of TeacherGRPOTrainer's own"
        )
    if path is not None and not waiting:
        raise ConfigError(
            f"judge.path={path}: no reward asks it; name rim in rewards, and leave "
            "reward_system.small.base_url out"
        )


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
        for source in _waiting(sources):
            source.own_judge = endpoint

    def rest(self) -> None:
        """Lets the judge's ranks end."""
        if self.mailbox and self.role.rank == 0:
            self.mailbox.post(_rest(self.rests), "rest")
        self.rests += 1

    def _await_server(self) -> Endpoint:
        self.server.wait_until_ready(lambda: None)
        return Endpoint(self.server.base_url, None, self.server.api_key)


def _waiting(sources: Sequence[RewardSource]) -> list[RIMReward]:
    """Those that ask the run's own judge."""
    return [s for s in sources if isinstance(s, RIMReward) and s.needs_own_judge]


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
