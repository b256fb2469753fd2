"""What is predicted is what a run takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cores(4)

ROOT = Path(__file__).resolve().parents[2]
NEAR = 0.15


def rows_of(tmp_path, *arguments: str) -> list[dict]:
    output = tmp_path / "memory.json"
    command = [sys.executable, ROOT / "tools/bench_memory.py", *arguments, "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())


def check(rows: list[dict], phases: set[str]) -> None:
    for row in rows:
        assert {*row["measured"]} == phases
        for phase, measured in row["measured"].items():
            assert row["predicted"][phase] == pytest.approx(measured, rel=NEAR), (row, phase)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["30M", "120M", "300M"])
def test_memory_of_training_is_as_predicted(tmp_path, model):
    rows = rows_of(tmp_path, "--models", model, "--without-engine")
    check(rows, {"init", "log-probs", "update"})


@pytest.mark.slow
def test_memory_of_a_run_with_an_engine_is_as_predicted(tmp_path):
    rows = rows_of(tmp_path, "--models", "120M")
    check(rows, {"init", "log-probs", "update", "sync", "engine"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "bfloat16", "--rows", "2", "--length", "1024"],
        ["--recompute", "full", "--length", "1024"],
        ["--layouts", "2x1x1", "--sequence-parallel"],
        ["--layouts", "1x1x2", "--distributed-optimizer", "--dtype", "bfloat16"],
    ],
    ids=["bfloat16", "recompute", "tensor parallel", "distributed optimizer"],
)
def test_options_are_as_predicted(tmp_path, options):
    check(rows_of(tmp_path, "--models", "30M", "--without-engine", *options),
          {"init", "log-probs", "update"})  # fmt: skip
