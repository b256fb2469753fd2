"""The handle of an engine whose processes misbehave."""

import subprocess
from multiprocessing import Pipe
from threading import Thread
from types import SimpleNamespace

import pytest

from grpo_mcore.rollout.engine import Engine, EngineCalls, EngineError


class Handle(Engine):
    """Of processes that do not end when they are told to."""

    def __init__(self, connection, log):
        EngineCalls.__init__(self, "policy-0", f"its log: {log}", {"sync": 0.01})
        self.log = log
        log.touch()
        self.connection = connection
        self.reader = Thread(target=self._read)

        def wait(seconds: float) -> None:
            raise subprocess.TimeoutExpired("engine", seconds)

        self.process = SimpleNamespace(pid=1234, terminate=lambda: None, wait=wait)


def test_an_answer_that_comes_too_late_is_passed_over(tmp_path):
    ours, theirs = Pipe()
    engine = Handle(ours, tmp_path / "log")
    with pytest.raises(EngineError, match="nothing heard of 'sleep'"):
        engine.call("sleep", 1)
    theirs.send(("ok", None))
    theirs.close()
    engine._read()
    assert engine.is_dead


def test_processes_that_do_not_end_are_told_of(tmp_path, capsys):
    ours, theirs = Pipe()
    engine = Handle(ours, tmp_path / "log")
    engine.reader.start()
    theirs.close()
    with pytest.raises(EngineError, match=r"died in 'sleep' \(process 1234 does not end within 60"):
        engine.call("sleep", 1)
    engine.close()
    assert "warning: engine policy-0: process 1234 does not end" in capsys.readouterr().out
