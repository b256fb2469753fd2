"""Jobs on random models, and the processes that run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "run_teacher_grpo.sh"


@pytest.fixture(scope="session")
def job(tiny_models, tmp_path_factory) -> list[str]:
    """Overrides of a small job: a Qwen3 teacher with tied embeddings, a Llama student."""
    from examples.demo import problems

    data = tmp_path_factory.mktemp("job") / "questions.jsonl"
    rows = [problems.rl_row(question) for question in problems.train_questions(0, 24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "experiment=demo",
        "prepare=null",
        f"teacher.path={tiny_models / 'qwen3_tied'}",
        f"student.path={tiny_models / 'llama'}",
        f"data.train={data}",
        f"data.eval={data}",
        "data.eval_size=4",
        "num_prompts_per_step=4",
        "num_generations=4",
        "per_device_train_batch_size=2",
        "log_completions=16",
        "max_completion_length=12",
        "max_answer_tokens=8",
        "eval_steps=0",
        "save_steps=0",
        "rollout.kv_cache_gib=0.05",
        "rollout.deadline_seconds=240",
    ]


def run_command(command: list, fails: bool = False, timeout: float = 280, **environment) -> str:
    """Runs a command to its end, which must be a success unless `fails`; returns its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert bool(done.returncode) == fails, done.stdout.split("elastic/multiprocessing")[0][-6000:]
    return done.stdout


def run_script(
    script: Path,
    *arguments,
    ranks: int = 0,
    fails: bool = False,
    timeout: float = 280,
    **environment,
) -> str:
    """As `run_command` of `python SCRIPT`, or of so many ranks of it, forked from a process that
    has imported what they need."""
    settings = clean_environment() | environment
    code, output = run_forked(script, [*arguments], settings, timeout, ranks)
    assert bool(code) == fails, output[-6000:]
    return output


def clean_environment() -> dict[str, str]:
    # A test of this process that joined a world has left its address there.
    joined = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in joined}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHON"] = sys.executable
    environment["OMP_NUM_THREADS"] = "1"
    site = [] if forked.are_real else [ROOT / "tests" / "site"]
    environment["PYTHONPATH"] = ":".join(map(str, [*site, ROOT]))
    return environment


def torchrun(processes: int, *arguments) -> list:
    """A torchrun command on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    return [*command, "--standalone", f"--nproc-per-node={processes}", *arguments]


def records(directory: Path, name: str = "metrics") -> list[dict]:
    """The JSON lines `name` of a run."""
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
