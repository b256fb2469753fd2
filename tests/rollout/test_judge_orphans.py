"""However a process with a judge of its own ends, nothing of the judge is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import ROOT, clean_environment
from tests.rollout.test_orphans import MARK, processes_of, shared_memory_of

pytestmark = [pytest.mark.engine, pytest.mark.real_engines]

WORKER = Path(__file__).with_name("judge_orphans_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["success", "error", "Ctrl-C", "killed"])
def test_nothing_of_a_judge_with_two_workers_is_left_after(judge_model, tmp_path, end):
    temporary = Path(tempfile.mkdtemp())  # whose name is short enough for sockets
    way = end if end in ("success", "error") else "kill"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(judge_model), str(tmp_path), way],
            cwd=ROOT,
            env=clean_environment()
            | {MARK: str(tmp_path), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
    shared, seen = set(), set()
    while process.poll() is None:
        running = processes_of(tmp_path)
        seen |= running
        shared |= shared_memory_of(running)
        if way == "kill" and (tmp_path / "failures").exists():
            process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL)
            way = "killed"
        time.sleep(0.2)
    said = (tmp_path / "output").read_text()
    assert (tmp_path / "failures").read_text() == "{}", said[-3000:]
    assert (process.returncode == 0) == (end == "success"), said[-3000:]
    for other in seen | processes_of(tmp_path):
        with suppress(psutil.NoSuchProcess):  # gone meanwhile
            other.wait(60)
    assert len(seen) > 4  # this process's, a guard, a server, two workers at least
    assert len(shared) > 2
    assert not [path for path in shared if os.path.exists(path)]
    left = list(temporary.rglob("*"))
    assert not [path for path in left if path.is_socket() or "grpo_mcore" in path.name]
    shutil.rmtree(temporary)
