"""`grpo-mcore teach` as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from grpo_mcore.cli import main
from grpo_mcore.trainers.tutor import Tutor
from tests.end_to_end.conftest import ROOT, clean_environment, run_script
from tests.teaching.conftest import GAP, SETTINGS, TASK

pytestmark = [pytest.mark.cores(2), pytest.mark.engine]

DEADLINE = 280


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    """A file for --config."""
    directory = tmp_path_factory.mktemp("teach")
    nested = {name: value for name, value in SETTINGS.items() if "." not in name}
    rollout = {"kv_cache_gib": 0.05, "deadline_seconds": 240}
    file = directory / "settings.yaml"
    file.write_text(yaml.safe_dump(nested | {"rollout": rollout}))
    return file


def start(*arguments, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "grpo_mcore.cli", "teach", *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment() | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments, given: str = "") -> tuple[int, str, str]:
    process = start(*arguments)
    output, errors = process.communicate(given, timeout=DEADLINE)
    return process.returncode, output, errors


def blocks(output: str) -> dict[str, str]:
    """The last tutorial's parts, by the first word of their headings."""
    parts = [part.partition("\n") for part in output.strip().split("\n\n")[-4:]]
    return {head.split(" (")[0].rstrip(":"): body for head, _, body in parts}


def test_each_line_of_the_input_is_a_task(classroom_models, settings, tmp_path):
    code, output, errors = run(
        "--teacher", classroom_models.teacher, "--student", classroom_models.weak,
        "--config", settings, f"output_dir={tmp_path}",
        given=f"tom has 9 cards.\n\n{'tom has 7 cards. ' * 30}\ntom has 7 cards.\n",
    )  # fmt: skip
    assert code == 0, errors[-3000:]
    assert output.count("student alone:") == output.count("student taught:") == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: task: with templates.diagnostic it makes a prompt of")
    assert "task:" not in output  # nobody sits at this terminal
    found = blocks(output)
    assert found["student alone"].strip() == "7"
    diagnosis = next(line for line in output.splitlines() if line.startswith("diagnosis: "))
    assert all(name in diagnosis for name in ("capability", "agreement", "likelihood", "grade"))
    assert f"  - {GAP}" in output and "approach:  i would multiply." in output
    assert "guidance (hints):\nthink again." in output


@pytest.mark.slow
@pytest.mark.seed(82, 84)
def test_a_trainer_on_separate_processes_and_what_it_leaves_say_the_same(
    classroom_models, tmp_path
):
    """The processes of the student are told too. The settings of the run are in its checkpoint."""
    directory, student = tmp_path / "run", classroom_models.strong
    worker = ROOT / "tests" / "teaching" / "diagnosis_worker.py"
    output = run_script(worker, classroom_models.teacher, student, directory, ranks=2)
    told = [json.loads(text) for text in re.findall(r"^rank \d: (.*)$", output, re.MULTILINE)]
    refused = [rank.pop("refused") for rank in told]
    assert len(told) == 2 and told[0] == told[1] and told[0]["same"]
    assert refused[0][:2] == refused[1][:2] and refused[0][0] == refused[0][1]
    assert refused[0][0].startswith("ConfigError: task: with templates.diagnostic it makes a")
    assert refused[0][2].startswith("RequestError: student: request 0 has ")
    assert refused[1][2] == ""  # who only carries the student is given no answers
    assert told[0]["guidance"] == "yes, that is right."
    for teacher in (directory / "final", directory / "checkpoints"):
        code, output, errors = run(
            "--teacher", teacher, "--student", student, "--task", TASK,
            f"output_dir={tmp_path / 'out'}",
        )  # fmt: skip
        assert code == 0, errors[-3000:]
        assert "guidance (verification):\nyes, that is right." in output
        assert f"approach: {told[0]['diagnosis']['approach']}" in output


@pytest.mark.slow
def test_ctrl_c_ends_it_and_its_engines(classroom_models, settings, tmp_path):
    process = start(
        "--teacher", classroom_models.teacher, "--student", classroom_models.weak,
        "--config", settings, f"output_dir={tmp_path}",
        environment={"PYTHONPATH": str(ROOT)},  # with engines that are its own children
        start_new_session=True,
    )  # fmt: skip
    process.stdin.write("tom has 9 cards.\n")
    process.stdin.flush()
    while not process.stdout.readline().startswith("student taught"):
        assert process.poll() is None
    engines = psutil.Process(process.pid).children(recursive=True)
    assert engines
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and "Traceback" not in errors
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    "change, message",
    [
        (("temperatur=1",), "temperatur: unknown configuration key; did you mean temperature?"),
        (("--config", "nowhere.yaml"), "--config=nowhere.yaml: [Errno 2] No such file"),
        (("--task", " "), "task=' ': is empty"),
    ],
)
def test_an_error_is_one_line(classroom_models, settings, monkeypatch, capsys, change, message):
    command = ["grpo-mcore", "teach", "--teacher", classroom_models.teacher, "--student"]
    arguments = [*command, classroom_models.weak, "--config", str(settings), *change]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(Tutor, "__enter__", lambda tutor: pytest.fail("engines were started"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1
    assert shown.err.startswith(f"error: {message}")
