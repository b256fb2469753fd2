"""Kills engines in the phases of their work."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from grpo_mcore.rollout.engine import Call, Engine

DEATH_AFTER = 3
"""Completions of a generation that are there when its engine is killed."""
PHASES = {"start": "start", "generate": "generate", "receive_bucket": "sync"}
"""Of an engine's methods, those amid which it can be killed."""


@contextmanager
def killing(
    *plan: str, victim: str = "engine", of: str = "", after: int = 0
) -> Iterator[list[Call]]:
    """Engines die in the phases of `plan`, "start", "generate" or "sync", one after the other.

    Args:
        victim: "engine", vLLM's own process, or "worker", one of its tensor parallel workers.
        of: engines whose names begin so.
        after: so many generations have been asked for.

    Yields:
        Calls of `generate`, as they are made.
    """
    left, calls, submit = list(plan), [], Engine.submit
    has_engines = False

    def submit_and_kill(engine: Engine, method: str, *arguments) -> Call:
        nonlocal has_engines
        call = submit(engine, method, *arguments)
        if engine.name.startswith(of):
            has_engines = True
            is_time = len(calls) >= after
            if method == "generate":
                calls.append(call)
            if is_time and left and left[0] == PHASES.get(method):
                left.pop(0)
                kill(engine, call, victim)
        return call

    Engine.submit = submit_and_kill
    try:
        yield calls
    finally:
        Engine.submit = submit
    assert not (left and has_engines), f"not killed at {left}"


def kill(engine: Engine, call: Call, victim: str) -> None:
    """SIGKILL, once the call is under way."""
    while call.method == "generate" and len(call.finished) < DEATH_AFTER:
        time.sleep(1e-3)
    while not (found := processes(engine)[victim]):
        time.sleep(1e-2)
    os.kill(found[-1].pid, signal.SIGKILL)


def processes(engine: Engine) -> dict[str, list[psutil.Process]]:
    """The engine's processes that there are yet."""
    found = {"engine": psutil.Process(engine.process.pid).children(), "worker": []}
    for process in found["engine"]:
        found["worker"] += [child for child in process.children() if _is_worker(child)]
    return found


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "resource_tracker" not in str(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended since it was listed
        return False
