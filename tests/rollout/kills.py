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
        is_meant = engine.name.startswith(of)
        has_engines |= is_meant
        is_time = is_meant and len(calls) >= after and left[:1] == [PHASES.get(method)]
        # To look takes long enough for a generation to end meanwhile.
        found = processes(engine)[victim] if is_time else []
        call = submit(engine, method, *arguments)
        if is_meant and method == "generate":
            calls.append(call)
        if is_time:
            left.pop(0)
            kill(engine, call, victim, found)
        return call

    Engine.submit = submit_and_kill
    try:
        yield calls
    finally:
        Engine.submit = submit
    assert not (left and has_engines), f"not killed at {left}"


def kill(engine: Engine, call: Call, victim: str, found: list[psutil.Process]) -> None:
    """SIGKILL to the last of those `found`, or where there were none yet, of those that come; once
    the call is under way."""
    while call.method == "generate" and len(call.finished) < DEATH_AFTER:
        assert not engine.is_dead
        time.sleep(1e-3)
    while not found:
        time.sleep(1e-2)
        found = processes(engine)[victim]
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
