"""The handle of one vLLM engine, held by the rank that leads its replica."""

import os
import socket
import struct
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Condition, Thread

from tqdm import tqdm

from grpo_mcore.errors import KnownError
from grpo_mcore.rollout.guard import NO_SOCKET
from grpo_mcore.rollout.requests import Completion, Generated

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
CLOSE_SECONDS = 60.0
"""The longest wait for killed processes to be gone."""


class EngineError(KnownError, RuntimeError):
    """An engine failed, died or was silent for too long; the text holds its own error and where its
    log is."""


class Call:
    """A call of an engine: waiting for its turn, under way, or answered.

    Attributes:
        finished: of `generate`: completions by the place of their requests; it grows meanwhile.
        tokens: of `generate`: sampled so far, of unfinished requests too.
        begun, ended: seconds since the epoch; 0 before.
    """

    def __init__(self, method: str, arguments: tuple):
        self.method, self.arguments = method, arguments
        self.finished: dict[int, Completion] = {}
        self.tokens = 0
        self.begun = self.ended = 0.0
        self.heard = 0.0
        """When something was last heard of it, by the monotonic clock."""
        self.answer: tuple | None = None
        """("ok", what the method returned) or ("error", the engine's traceback)."""


class EngineCalls(ABC):
    """An engine's calls. They may be made ahead with `submit` and are answered in order by
    `result`.

    Attributes:
        where: its log or address, for errors.
        deadlines: the longest silence (seconds) by phase: "start", "generate" and, of all other
            methods, "sync".
    """

    def __init__(self, name: str, where: str, deadlines: dict[str, float]):
        self.name, self.where, self.deadlines = name, where, deadlines
        self.calls: deque[Call] = deque()
        """Calls whose results were not taken; those with an answer come first."""
        self.is_dead = False
        self.news = Condition()
        """Held for whatever changes in calls."""

    def call(self, method: str, *arguments):
        """Runs `method` in the engine and returns its answer."""
        self.submit(method, *arguments)
        return self.result(method)

    def submit(self, method: str, *arguments) -> Call:
        """Asks for `method` after all that was asked before. What fails, `result` raises."""
        call = Call(method, arguments)
        with self.news:
            self.calls.append(call)
            if self._under_way() is call:
                self._send(call)
        return call

    def wait(self, seconds: float) -> bool:
        """Waits, at most so long, for `result` to have something to return or raise. Returns
        whether it has."""
        until = time.monotonic() + seconds
        with self.news:
            while not (is_settled := self._is_settled()):
                call, now = self.calls[0], time.monotonic()
                if now >= until:
                    break
                silent_until = call.heard + self.deadlines[_phase(call.method)]
                self.news.wait(min(until, silent_until) - now)
        return is_settled

    def result(self, method: str):
        """The answer to the oldest call whose result was not taken; of `generate`, Generated.

        Raises:
            EngineError: when the call failed there, the engine died, or nothing was heard of the
                call for longer than its phase's deadline.
            RuntimeError: when the oldest call is to another method.
        """
        call = self.calls[0]
        if call.method != method:
            raise RuntimeError(f"engine {self.name} owes an answer to '{call.method}' first")
        self.wait(float("inf"))
        with self.news:
            self.calls.popleft()
        if call.answer is None:
            raise self._unanswered(method)
        kind, content = call.answer
        if kind == "error":
            raise EngineError(f"engine {self.name} failed in '{method}' ({self.where}):\n{content}")
        if method == "generate":
            completions = [call.finished[place] for place in range(len(call.finished))]
            return Generated(completions, call.begun, call.ended)
        return content

    @abstractmethod
    def close(self) -> None:
        """Ends it, as far as it is ours."""

    @abstractmethod
    def _send(self, call: Call) -> None:
        """Brings a call under way."""

    def _answered(self, call: Call, answer: tuple) -> None:
        """Takes in the answer of the call under way; `news` is held."""
        call.answer, call.ended = answer, time.time()
        following = self._under_way()
        if following:
            self._send(following)

    def _under_way(self) -> Call | None:
        return next((call for call in self.calls if call.answer is None), None)

    def _is_settled(self) -> bool:
        call = self.calls[0]
        silence = time.monotonic() - call.heard
        return (
            call.answer is not None
            or self.is_dead
            or silence >= self.deadlines[_phase(call.method)]
        )

    def _unanswered(self, method: str) -> EngineError:
        """Why there is no answer."""
        phase = _phase(method)
        return EngineError(
            f"engine {self.name}: nothing heard of '{method}' for {self.deadlines[phase]:.0f} s "
            f"(rollout.{phase}_seconds); {self.where}"
        )


class Engine(EngineCalls):
    """A vLLM engine in processes of its own. A thread of this process sends each call when the one
    before is answered, and takes in what the engine says, so the engine never waits for this
    process."""

    def __init__(
        self, name: str, environment: dict[str, str], log: Path, deadlines: dict[str, float]
    ):
        """Starts the processes.

        Args:
            environment: set in them on top of this process's own.
            deadlines: as of EngineCalls.
        """
        super().__init__(name, f"its log: {log}", deadlines)
        self.log = log
        ours, theirs = socket.socketpair()
        longest = struct.pack("ll", int(max(deadlines.values())) + 1, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, longest)
        with theirs:
            command = ["grpo_mcore.rollout.child", str(theirs.fileno())]
            self.process = start_guarded(command, environment, log, theirs.fileno())
        self.connection = Connection(ours.detach())
        self.reader = Thread(target=self._read, name=f"reader of {name}", daemon=True)
        self.reader.start()

    def close(self) -> None:
        """Ends the engine's processes."""
        self.process.terminate()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # the other ranks go on, and so does this one
            tqdm.write(f"warning: engine {self.name}: {self._undead()}")
            return
        self.reader.join()
        self.connection.close()

    def _read(self) -> None:
        """Takes in what the engine says until it is gone."""
        while True:
            try:
                kind, content = self.connection.recv()
            except (EOFError, OSError):
                break
            with self.news:
                call = self._under_way()
                if call is None:  # it was given up for its silence
                    continue
                call.heard = time.monotonic()
                if kind == "progress":
                    finished, call.tokens = content
                    call.finished |= finished
                else:
                    self._answered(call, (kind, content))
                self.news.notify_all()
        with self.news:
            self.is_dead = True
            self.news.notify_all()

    def _send(self, call: Call) -> None:
        call.begun, call.heard = time.time(), time.monotonic()
        try:
            self.connection.send((call.method, call.arguments))
        except OSError:  # it died, or reads no more
            self.is_dead = True

    def _unanswered(self, method: str) -> EngineError:
        if not self.is_dead:
            return super()._unanswered(method)
        self.process.terminate()  # where it lives but has stopped listening
        try:
            outcome = f"exit code {self.process.wait(CLOSE_SECONDS)}"
        except subprocess.TimeoutExpired:
            outcome = self._undead()
        return EngineError(
            f"engine {self.name} died in '{method}' ({outcome}); {self.log} ends:\n"
            f"{last_lines(self.log)}"
        )

    def _undead(self) -> str:
        return f"process {self.process.pid} does not end within {CLOSE_SECONDS:.0f} s"


def start_guarded(
    command: list[str], environment: dict[str, str], log: Path, socket: int = NO_SOCKET
) -> subprocess.Popen:
    """Runs `python -m COMMAND` under the guard, whose process is returned.

    Args:
        command: a module and its arguments; the guard's process id is added to them.
        environment: set on top of this process's own.
        log: what output is appended to.
        socket: a file descriptor that the module is to have.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(_TORCHRUN)}
    guard = ["grpo_mcore.rollout.guard", str(os.getpid()), str(socket)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *guard, *command],
            env=inherited | environment,
            pass_fds=[] if socket == NO_SOCKET else [socket],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is this process's to act on
        )


def last_lines(log: Path) -> str:
    """What a log ends with."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _phase(method: str) -> str:
    return method if method in ("start", "generate") else "sync"
