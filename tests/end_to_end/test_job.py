"""The script as users start it: separate roles, resume, two nodes, and errors on every rank."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import (
    ROOT,
    SCRIPT,
    clean_environment,
    records,
    run_command,
    torchrun,
)

pytestmark = [pytest.mark.cores(3), pytest.mark.engine]

REAL_ENGINES = {"PYTHONPATH": str(ROOT)}
"""Environment of jobs whose end is what is tested, that of their engines included."""

FOUR_STEPS = ["max_steps=4", "save_steps=1", "save_total_limit=2", "weight_decay=10", "beta=1"]
"""A random student earns no reward; the weights decay, and the reference pulls them back."""
SEPARATE = ["layout.placement=separate", "layout.teacher=1x2x1", "layout.student=1x1x1"]


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory) -> tuple[Path, str]:
    """A run of four steps with a checkpoint after each; its directory and its output."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    overrides = [*job, *SEPARATE, *FOUR_STEPS, f"output_dir={directory}"]
    return directory, run_command(["bash", SCRIPT, *overrides], NPROC_PER_NODE="3")


@pytest.mark.seed("A4")
def test_prints_the_layout_and_one_line_a_step(finished):
    _, output = finished
    lines = output.splitlines()
    layout = "separate: teacher 1x2x1 (TPxPPxDP) with 1 engine, student 1x1x1"
    assert sum(layout in line for line in lines) == 1
    for step in (1, 2, 3, 4):
        assert sum(line.startswith(f"step    {step}  reward") for line in lines) == 1
    assert sum(line.startswith("eval") for line in lines) == 2


def test_says_after_each_step_that_engine_and_trainer_agree(finished):
    directory, output = finished
    steps = [r for r in records(directory) if "reward" in r]
    lines = output.splitlines()
    for record in steps:
        place = next(i for i, x in enumerate(lines) if x.startswith(f"step    {record['step']}  "))
        sampled = record["step"] - 1
        assert lines[place + 1] == (
            f"sync ok: 0 of {record['sync/tensors']:.0f} tensors differ, mismatch "
            f"{record['sampling/mismatch']:.4f}, engine {sampled} = trainer {sampled}"
        )


def test_records_every_step(finished):
    directory, _ = finished
    steps = [r for r in records(directory) if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4]
    for record in steps:
        assert record["sampling/max"] < 1e-4
        assert record["sync/tensors"] > 20
        assert record["num_tokens"] > 0
        phases = ("attempts", "guidance", "taught", "reward", "reference", "update", "sync")
        assert sum(record[f"time/{p}"] for p in phases) <= record["time/step"] * 1.001
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    evaluations = [r["step"] for r in records(directory) if "eval_sampled_accuracy_delta" in r]
    assert evaluations == [0, 4]
    assert len(records(directory, "completions")) == 4 * 16


def test_student_works_while_the_teacher_trains(finished):
    directory, _ = finished
    later = [r for r in records(directory) if r.get("step", 0) > 1 and "reward" in r]
    assert later
    for record in later:
        assert record["time/student_attempts_during_training"] > 0


@pytest.mark.seed(53)
def test_exports_a_teacher_that_transformers_loads(finished, job):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, _ = finished
    model = AutoModelForCausalLM.from_pretrained(directory / "final", dtype="auto")
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(directory / "final")
    tokens = tokenizer("tom has 14 cards.", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()


def test_its_checkpoint_is_what_an_engine_gets(finished, tmp_path):
    """The limit is one that even rounding is above, so all of the tool's answers are seen."""
    directory, _ = finished
    tool, file = ROOT / "tools" / "verify_sync.py", tmp_path / "verified.json"
    options = ["--max-tokens", "6", "--max-mismatch", "1", "--threshold", "1e-8"]
    command = [sys.executable, tool, directory / "checkpoints", *options, "--output", file]
    output = run_command(command, fails=True)
    found = json.loads(file.read_text())
    assert found["difference"] is None and found["tensors"] == 24 and found["bytes"] > 1e5
    assert found["engine_version"] == found["trainer_version"]
    assert f"24 tensors, {found['bytes'] / 2**20:.1f} MiB: 0 differ" in output
    samples, whole = found["samples"], found["all"]
    assert 0 < sum(sample["tokens"] for sample in samples) <= 6 * len(samples)
    mean = sum(s["mismatch"] * s["tokens"] for s in samples) / sum(s["tokens"] for s in samples)
    assert whole["mismatch"] == pytest.approx(mean, rel=1e-12)
    assert whole["max"] == max(sample["max"] for sample in samples) < 1e-4
    assert 1 < whole["mismatch"] < 1.0001 and not found["ok"]
    assert f"mismatch {whole['mismatch']:.6f} is above 1.0" in output
    beyond = [sample["first_beyond"] for sample in samples if sample["first_beyond"]]
    assert beyond and all(1e-8 < abs(b["trainer"] - b["engine"]) < 1e-4 for b in beyond)


def test_the_module_in_which_another_model_differs_is_named(finished, tmp_path):
    """An engine is given the exported model with one tensor altered."""
    directory, _ = finished
    altered, file = tmp_path / "altered", tmp_path / "diagnosed.json"
    shutil.copytree(directory / "final", altered)
    weights = load_file(altered / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3] *= 1.5
    save_file(weights, altered / "model.safetensors", {"format": "pt"})
    tool = ROOT / "tools" / "diagnose_mismatch.py"
    options = ["--engine-model", altered, "--output", file]
    output = run_command([sys.executable, tool, directory / "checkpoints", *options], fails=True)
    found = json.loads(file.read_text())
    assert found["first"] == "model.layers.1.mlp.down_proj"
    assert "of its output: model.layers.1.mlp.down_proj" in output
    names = [module["module"] for module in found["modules"]]
    before = found["modules"][: names.index(found["first"])]
    assert len(before) == 24 and all(module["relative"] < 1e-5 for module in before)


def test_a_killed_run_is_repeated_exactly(finished, job, tmp_path):
    """Killed in its third step and its newest checkpoint damaged: metrics, texts and weights are
    those of the run that was left alone."""
    whole, _ = finished
    part = tmp_path / "part"
    command = ["bash", SCRIPT, *job, *SEPARATE, *FOUR_STEPS, f"output_dir={part}", "resume=auto"]
    second = part / "checkpoints" / "iter_0000002"
    kill_when(second.exists, command)
    assert not (part / "checkpoints" / "iter_0000004").exists()
    with next(second.glob("*.distcp")).open("r+b") as shard:
        shard.truncate(1000)
    first = json.loads((second.with_name("iter_0000001") / "state.json").read_text())
    output = run_command(command, NPROC_PER_NODE="3")
    warning = rf"warning: {second} is passed over: __\d+_\d+.distcp has 1000 bytes for \d+"
    assert len(re.findall(warning, output)) == 1
    assert f"going on from {second.with_name('iter_0000001')}" in output
    assert all(record["grad_norm"] > 1e-3 for record in records(whole) if record["step"] in (2, 3))
    weights = [directory / "final" / "model.safetensors" for directory in (part, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    left = {"iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt"}
    assert {path.name for path in (part / "checkpoints").iterdir()} == left

    def deterministic(directory):
        return [
            {k: v for k, v in record.items() if not k.startswith("time/")}
            for record in records(directory)
        ]

    assert deterministic(part) == deterministic(whole)
    # The attempts of step 2 were in the checkpoint: they took as long to the last digit.
    work = first["trainer"]["attempts"]["step 1"]["work"]
    second_step = next(r for r in records(part) if r["step"] == 2)
    assert second_step["time/student_attempts"] == work["finished"] - work["started"]
    assert records(part, "completions") == records(whole, "completions")


def kill_when(condition, command: list) -> None:
    """Starts `command` and kills all of it at once when `condition()` holds."""
    started = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=clean_environment() | {"NPROC_PER_NODE": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not condition():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for process in (*psutil.Process(started.pid).children(recursive=True), started):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    started.wait()


def test_an_earlier_run_is_not_written_over(finished, job):
    directory, _ = finished
    before = (directory / "metrics.jsonl").read_bytes()
    overrides = [*job, *SEPARATE, "max_steps=4", f"output_dir={directory}"]
    output = run_command(["bash", SCRIPT, *overrides], fails=True, NPROC_PER_NODE="3")
    assert f"error: output_dir={directory}: holds an earlier run" in output
    assert (directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_two_nodes(job, tmp_path):
    """The script started on each: the teacher's process on one, the student's on the other. With
    weights in bfloat16."""
    overrides = [*job, "max_steps=1", "data.eval=null", f"output_dir={tmp_path / 'run'}"]
    overrides += ["teacher.dtype=bfloat16", "student.dtype=bfloat16"]
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}
    agents = [
        subprocess.Popen(
            ["bash", SCRIPT, *overrides],
            cwd=ROOT,
            env=clean_environment() | nodes | {"NODE_RANK": str(node), "NPROC_PER_NODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    outputs = [agent.communicate(timeout=280)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "separate: teacher 1x1x1" in outputs[0]
    assert "step    1" in outputs[0] and "step    1" not in outputs[1]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert 1 <= records(tmp_path / "run")[0]["sampling/mismatch"] < 1.02


def test_a_wrong_setting_ends_every_rank_with_one_line(job):
    command = torchrun(2, SCRIPT, *job, "layout.teacher=2x2x1")
    output = run_command(command, fails=True, timeout=90)
    said = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "layout.teacher=2x2x1" in said[0] and "does not fit 2 processes" in said[0]


def test_started_by_bash_a_wrong_setting_prints_nothing_else(job):
    output = run_command(["bash", SCRIPT, *job, "num_generation=4"], fails=True, timeout=90)
    assert output.splitlines() == [
        "error: num_generation: unknown configuration key; did you mean num_generations?"
    ]


@pytest.mark.slow
def test_a_run_in_which_trainer_and_engine_disagree_stops_with_one_line(job, tmp_path):
    """Every rank finds it; no float32 agrees to the last digit."""
    overrides = [*job, *SEPARATE, "max_steps=2", "data.eval=null", f"output_dir={tmp_path / 'run'}"]
    overrides += ["rollout.mismatch_warn=null", "rollout.mismatch_stop=1"]
    output = run_command(
        ["bash", SCRIPT, *overrides], fails=True, NPROC_PER_NODE="3", **REAL_ENGINES
    )
    said = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and said[0].startswith(
        "error: step 1: sampling/mismatch is 1.0000, above"
    )
    assert "rollout.mismatch_stop=1.0" in said[0]
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "final").exists()
    assert not processes_with_files_under(tmp_path / "run")


def processes_with_files_under(directory: Path) -> list[psutil.Process]:
    """What still runs of a job: its engines keep their logs open."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # gone, or not ours
            if any(f.path.startswith(str(directory)) for f in process.open_files()):
                found.append(process)
    return found


REWARDS = {
    "raises": "lambda **_: 1 / 0",
    "too few": "lambda completions, **_: [0.0]",
    "not a number": "lambda completions, **_: [float('nan')] * len(completions)",
}


@pytest.mark.slow
@pytest.mark.parametrize("reward", REWARDS)
def test_a_bad_reward_function_stops_the_run_with_its_name_and_step(job, tmp_path, reward):
    """From a script, under torchrun: both ranks of the teacher and the student's end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from grpo_mcore import TeacherGRPOTrainer\n"
        "from grpo_mcore.config.compose import compose_config\n"
        f"reward = {REWARDS[reward]}\n"
        "reward.__name__ = 'my_reward'\n"
        f"config = compose_config(Path({str(ROOT / 'examples/configs')!r}), 'demo', sys.argv[1:])\n"
        "TeacherGRPOTrainer(config, reward).train()\n"
    )
    overrides = [o for o in job if not o.startswith(("experiment", "data.eval"))]
    overrides += ["data.eval=null", "max_steps=2", f"output_dir={tmp_path / 'run'}"]
    layout = ["layout.placement=colocated"] if reward == "raises" else SEPARATE
    command = torchrun(2 if reward == "raises" else 3, script, *overrides, *layout)
    output = run_command(command, fails=True, **REAL_ENGINES)
    assert "reward function my_reward" in output
    assert "at step 1" in output
    assert not processes_with_files_under(tmp_path / "run")


SCRIPT_OF_TWO_TRAINERS = """
import sys
from pathlib import Path
from grpo_mcore import SFTConfig, SFTTrainer, TeacherGRPOTrainer
from grpo_mcore.config import ModelConfig
from grpo_mcore.config.compose import compose_config

model, sft, out, configs, layout, *overrides = sys.argv[1:]
sft_config = SFTConfig(
    model=ModelConfig(path=model), train=sft, output_dir=out + "/sft", max_steps=12, batch_size=4,
    per_device_train_batch_size=2, learning_rate=1e-2, layout=layout,
)
SFTTrainer(sft_config).train()
overrides += [f"teacher.path={out}/sft/final", f"output_dir={out}/grpo"]
TeacherGRPOTrainer(compose_config(Path(configs), "demo", overrides)).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_both_trainers_run_one_after_the_other_in_one_script(job, tmp_path, processes):
    """Without `if __name__ == "__main__"`, under plain Python and under torchrun, to the end."""
    sft = tmp_path / "sft.jsonl"
    sft.write_text(json.dumps({"prompt": "tom has ", "completion": "14 cards."}) + "\n")
    model = next(o for o in job if o.startswith("teacher.path=")).removeprefix("teacher.path=")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT_OF_TWO_TRAINERS)
    overrides = [o for o in job if not o.startswith(("experiment", "teacher.path", "data.eval"))]
    overrides += ["data.eval=null", "max_steps=2", "layout.placement=colocated"]
    start = [sys.executable] if processes == 1 else torchrun(processes)
    layout = f"1x1x{processes}"
    run_command(
        [*start, script, model, sft, tmp_path, ROOT / "examples/configs", layout, *overrides]
    )
    losses = [r["loss"] for r in records(tmp_path / "sft")]
    assert losses[0] > 5 and losses[-1] < 0.5 * losses[0]
    steps = records(tmp_path / "grpo")
    assert len(steps) == 2
    assert steps[1]["time/student_attempts_during_training"] > 0
    assert (tmp_path / "grpo" / "final" / "model.safetensors").exists()
    assert not list(tmp_path.glob("grpo/checkpoints/*.partial"))
