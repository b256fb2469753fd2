"""Joins this process to the job: its roles, and the mailbox through which roles talk.

`separate`: each role is a torch.distributed world of its own, because Megatron uses the default
group where it takes no other (optimizer construction, distributed checkpoints).
`colocated`: one world, whose ranks carry both roles.
"""

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from grpo_mcore import device
from grpo_mcore.errors import PhaseTimeout
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role

ROUND_SECONDS = 10.0
"""The longest wait for a message before its sender's heartbeats are looked at."""
_joins: Counter[tuple[str, str]] = Counter()
"""How often this process has joined through each rendezvous (address, port)."""


class Mailbox:
    """Named JSON messages between roles, kept by the job's rendezvous store, and their heartbeats,
    which keep those who wait for a message of a role at work from giving it up."""

    def __init__(self, store: dist.Store, deadline_seconds: float):
        self.store = dist.PrefixStore("mailbox", store)
        self.deadline = deadline_seconds

    def post(self, name: str, message) -> None:
        self.store.set(name, json.dumps(message))

    def beat(self, sender: str) -> None:
        """Says that role `sender` is at work; from any of its ranks."""
        self.store.add(_beats_of(sender), 1)

    def take(self, name: str, sender: str, role: Role):
        """Waits, on all ranks of `role` together, for message `name` of role `sender`; removes and
        returns it.

        Raises:
            PhaseTimeout: on every rank, when for the deadline neither it nor a heartbeat has come.
        """
        beats, since = 0, time.monotonic()

        def look():
            nonlocal beats, since
            try:
                self.store.wait([name], timedelta(seconds=min(ROUND_SECONDS, self.deadline)))
            except dist.DistStoreError as error:
                known, beats = beats, self.store.add(_beats_of(sender), 0)
                if beats != known:
                    since = time.monotonic()
                elif time.monotonic() - since >= self.deadline:
                    raise PhaseTimeout(
                        f"heard nothing of the {sender} for {self.deadline:.0f} s while waiting "
                        f"for '{name}' (rollout.deadline_seconds): {error}"
                    ) from error
                return None
            content = self.store.get(name)
            self.store.delete_key(name)
            return content

        # The other ranks hear of each round, lest they give up rank 0.
        while (content := role.once(look)) is None:
            pass
        return json.loads(content)


class World:
    """This process's place in the job.

    Attributes:
        roles: the roles this process carries, by name.
        mailbox: messages between roles; None where one set of ranks carries them all.
    """

    def __init__(self, roles: dict[str, Role], mailbox: Mailbox | None):
        self.roles, self.mailbox = roles, mailbox


@contextmanager
def join(layouts: dict[str, Layout], placement: str, deadline_seconds: float) -> Iterator[World]:
    """Joins the job that torchrun describes in the environment, or is a job of one process.

    Args:
        layouts: the layout of each role, in rank order for `separate`.
        placement: "separate" (disjoint ranks) or "colocated" (every role on every rank).
        deadline_seconds: after which a wait for another rank is an error.
    """
    device.prepare()
    _describe_single_process()
    # Twice the deadline: where one rank waits for an engine or a message, its own error, which
    # names it, shall come before that of the ranks waiting for this one.
    timeout = timedelta(seconds=2 * deadline_seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # A process may join several times; what an earlier world left in the store is not this one's.
    rendezvous = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    store = dist.PrefixStore(f"join {_joins[rendezvous]}", store)
    _joins[rendezvous] += 1
    if placement == "separate":
        name, first = _role_of(rank, layouts)
        mine = {name: layouts[name]}
        dist.init_process_group(
            device.backend(),
            store=dist.PrefixStore(name, store),
            rank=rank - first,
            world_size=layouts[name].size,
            timeout=timeout,
        )
        mailbox = Mailbox(store, deadline_seconds)
    else:
        mine, mailbox = layouts, None
        dist.init_process_group(
            device.backend(), store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    try:
        yield World({name: Role(name, layout) for name, layout in mine.items()}, mailbox)
    finally:
        dist.destroy_process_group()


def _beats_of(role: str) -> str:
    return f"heartbeats of {role}"


def world_size() -> int:
    """Processes in this job, as torchrun says (1 outside torchrun)."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero() -> bool:
    """Whether this is the job's first process."""
    return int(os.environ.get("RANK", 0)) == 0


def _role_of(rank: int, layouts: dict[str, Layout]) -> tuple[str, int]:
    first = 0
    for name, layout in layouts.items():
        if rank < first + layout.size:
            return name, first
        first += layout.size
    raise ValueError(f"rank {rank} is in none of the roles {layouts}")


def _describe_single_process() -> None:
    """Sets what torchrun would, for a script started by plain `python`."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
