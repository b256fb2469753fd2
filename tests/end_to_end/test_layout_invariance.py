"""The same seed gives the same step at every layout: rollouts, loss and gradients."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.end_to_end.conftest import records, run_command, run_script
from tests.end_to_end.layouts_worker import CASES, TRAINED, size_of

pytestmark = [pytest.mark.cores(8), pytest.mark.engine]

REFERENCE = "1x1x1"
OPTIONS = [
    "beta=0.04", "use_bias_correction_kl=true", "vllm_importance_sampling_correction=true",
    "top_entropy_quantile=0.8", "entropy_coef=0.01", "off_policy_mask_threshold=1.0",
]  # fmt: skip
"""All that the loss wants to know of other ranks."""


def run_layouts(processes: int, directory: Path, job: list[str]) -> Path:
    worker = Path(__file__).with_name("layouts_worker.py")
    run_script(worker, directory, *job, *OPTIONS, ranks=processes, timeout=300)
    return directory


@pytest.fixture(scope="module")
def output(job, tmp_path_factory) -> Path:
    """Of the layouts of up to four processes."""
    return run_layouts(4, tmp_path_factory.mktemp("layouts"), job)


def result(output: Path, name: str) -> dict:
    return torch.load(output / f"{name}.pt", weights_only=False)


OF_FOUR = [name for name in CASES if size_of(name) <= 4]


@pytest.mark.seed("A4")
@pytest.mark.parametrize("name", [name for name in OF_FOUR if name != REFERENCE])
def test_first_step_is_the_same_at(output, name):
    assert_same_step(output, name)


@pytest.mark.slow
def test_first_step_is_the_same_on_eight_processes(job, tmp_path):
    run_layouts(8, tmp_path, job)
    for name in CASES.keys() - OF_FOUR:
        assert_same_step(tmp_path, name)


def assert_same_step(output: Path, name: str) -> None:
    expected, found = result(output, REFERENCE), result(output, name)
    directory = name.replace(" ", "_")

    def texts(case):
        return [
            (row["baselines"], row["approach"], row["guidance"], row["answer"])
            for row in records(output / case, "completions")
            if row["step"] == 1
        ]

    assert len(texts(REFERENCE)) == 16
    assert texts(directory) == texts(REFERENCE)
    for metric in ("loss", "kl", "grad_norm", "entropy", "reward"):
        assert found["metrics"][metric] == pytest.approx(expected["metrics"][metric], abs=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for tensor, gradient in expected["gradients"].items():
        assert (found["gradients"][tensor] - gradient).abs().max() <= 1e-5, tensor


def test_gradients_are_not_trivially_equal(output):
    gradients = result(output, REFERENCE)["gradients"].values()
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.seed("A1")
@pytest.mark.parametrize("name", OF_FOUR)
def test_trainer_and_engine_agree_on_the_first_step(output, name):
    metrics = result(output, name)["metrics"]
    assert metrics["sampling/max"] < 1e-4
    assert metrics["sampling/mismatch"] == pytest.approx(1, abs=1e-4)


GREEDY = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
for prompt in json.loads(sys.argv[2]):
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    print("said", json.dumps(generated[0, len(prompt):].tolist()))
"""


@pytest.mark.seed("A2")
def test_the_teacher_engine_holds_the_exported_weights(output):
    found = result(output, TRAINED)
    # In a process of its own: in one that Megatron was bridged to the CPU in, torch is not itself.
    prompts = json.dumps(found["prompts"])
    said = run_command([sys.executable, "-c", GREEDY, output / "exported", prompts])
    texts = [line.removeprefix("said ") for line in said.splitlines() if line.startswith("said")]
    assert [json.loads(text) for text in texts] == found["greedy"]


@pytest.mark.seed(15, 81, "A3")
def test_training_changed_the_teacher_and_not_the_student(output, tiny_models):
    from grpo_mcore.models.hf_files import HFReader

    found = result(output, TRAINED)
    assert found["student_after"] == found["student_before"]
    before = HFReader(tiny_models / "qwen3_tied", torch.float32)
    after = HFReader(output / "exported", torch.float32)
    assert set(before.names) == set(after.names)
    for name in before.names:
        assert not torch.equal(before.read(name), after.read(name)), name
