"""However a job ends, nothing of it is left: no process, no shared memory, no socket, no file."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import ROOT, clean_environment, torchrun
from tests.trainers.grpo_jobs import write_chat_model

pytestmark = [pytest.mark.cores(2), pytest.mark.engine, pytest.mark.real_engines]

MARK = "GRPO_MCORE_JOB_OF_THIS_TEST"
"""A variable that all processes of a job inherit."""


def processes_of(directory: Path) -> set[psutil.Process]:
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or not ours
            if process.environ().get(MARK) == str(directory):
                # vLLM writes its workers' titles over their variables.
                found |= {process, *process.children(recursive=True)}
    return found


def shared_memory_of(processes: set[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
    return found


def signalled(processes: set[psutil.Process], who: str) -> psutil.Process:
    def is_it(process: psutil.Process) -> bool:
        line = process.name() + " ".join(process.cmdline())
        rank = process.environ().get("RANK")
        return {
            "agent": "torch.distributed.run" in line,
            "rank 0": "orphans_worker" in line and rank == "0",
            "rank 1": "orphans_worker" in line and rank == "1",
            "engine": "rollout.child" in line and "rollout.guard" not in line,
            "worker": "Worker_TP1" in line,  # as vLLM titles the process
        }[who]

    return next(process for process in processes if is_it(process))


@pytest.mark.seed("A14")
@pytest.mark.slow
@pytest.mark.parametrize(
    "end", ["success", "error", "Ctrl-C", "rank 0", "rank 1", "engine", "worker"]
)
def test_nothing_is_left_after(tmp_path, end):
    write_chat_model(tmp_path / "model")
    temporary = Path(tempfile.mkdtemp())  # whose name is short enough for sockets
    way = end if end in ("success", "error") else "kill"
    command = torchrun(2, Path(__file__).with_name("orphans_worker.py"), tmp_path, way)
    with (tmp_path / "output").open("w") as output:
        agent = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=clean_environment() | {MARK: str(tmp_path), "TMPDIR": str(temporary)},
            stdout=output,
            stderr=output,
        )
    shared, seen = set(), set()
    while agent.poll() is None:
        running = processes_of(tmp_path)
        seen |= running
        shared |= shared_memory_of(running)
        if way == "kill" and (tmp_path / "run" / "metrics.jsonl").exists():
            who = "agent" if end == "Ctrl-C" else end
            number = signal.SIGINT if end == "Ctrl-C" else signal.SIGKILL
            signalled(running, who).send_signal(number)
            way = "killed"
        time.sleep(0.2)
    said = (tmp_path / "output").read_text()
    assert (agent.returncode == 0) == (end == "success"), said[-3000:]
    for process in seen | processes_of(tmp_path):
        with suppress(psutil.NoSuchProcess):  # gone meanwhile
            process.wait(60)
    assert len(seen) > 6  # an agent, two ranks, a guard, an engine, two workers at least
    assert len(shared) > 4, said[-3000:]
    assert not [path for path in shared if os.path.exists(path)]
    left = [path for path in temporary.rglob("*") if not path.name.startswith("torchelastic")]
    assert not [path for path in left if path.is_socket() or "grpo_mcore" in path.name]
    shutil.rmtree(temporary)
