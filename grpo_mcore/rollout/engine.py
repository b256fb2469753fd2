"""The handle of one vLLM engine, held by the rank that leads its replica."""

import os
import socket
import subprocess
import sys
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path

from grpo_mcore.errors import KnownError, PhaseTimeout

_TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "TORCH",
)
"""Prefixes of variables that would make vLLM think it is part of the trainer's job."""


class EngineError(KnownError, RuntimeError):
    """An engine failed or died; the text holds its own error and where its log is."""


class Engine:
    """A vLLM engine in a child process. Calls may be made ahead with `submit` and are answered in
    order by `result`. One at a time is under way: a second one, sent while the child is sending its
    answer to the first, could leave both waiting for the other to read."""

    def __init__(self, name: str, environment: dict[str, str], log: Path, deadline_seconds: float):
        """Starts the process; `environment` is set in it on top of this process's own."""
        self.name, self.log, self.deadline = name, log, deadline_seconds
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "grpo_mcore.rollout.child",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                env=inherited | environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.connection = Connection(ours.detach())
        self.calls: deque[tuple[str, tuple]] = deque()
        """Calls not yet answered; the first is under way."""

    def call(self, method: str, *arguments):
        """Runs `method` in the child and returns its answer."""
        self.submit(method, *arguments)
        return self.result(method)

    def submit(self, method: str, *arguments) -> None:
        self.calls.append((method, arguments))
        if len(self.calls) == 1:
            self._send()

    def result(self, method: str):
        """The answer to the oldest call not yet answered.

        Raises:
            EngineError: when the call failed there or the process died.
            PhaseTimeout: when no answer came within the deadline.
            RuntimeError: when the oldest call is to another method.
        """
        if self.calls[0][0] != method:
            raise RuntimeError(f"engine {self.name} owes an answer to '{self.calls[0][0]}' first")
        try:
            if not self.connection.poll(self.deadline):
                raise PhaseTimeout(
                    f"engine {self.name}: no answer to '{method}' in {self.deadline:.0f} s "
                    f"(rollout.deadline_seconds); its log: {self.log}"
                )
            status, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(method) from error
        self.calls.popleft()
        if self.calls:
            self._send()
        if status == "error":
            raise EngineError(f"engine {self.name} failed in '{method}' ({self.log}):\n{answer}")
        return answer

    def close(self) -> None:
        """Ends the process and everything it started."""
        self.connection.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self) -> None:
        try:
            self.connection.send(self.calls[0])
        except OSError as error:
            raise self._died(self.calls[0][0]) from error

    def _died(self, method: str) -> EngineError:
        code = self.process.poll()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        return EngineError(
            f"engine {self.name} died in '{method}' (exit code {code}); {self.log} ends:\n{tail}"
        )
