"""Real questions through all phases, with models of real shapes but random weights."""

import json

import pytest

from tests.conftest import write_family_model
from tests.end_to_end.conftest import ROOT, SCRIPT, records, run_command

pytestmark = [pytest.mark.cores(3), pytest.mark.engine]

QUESTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
FAMILIES = {"qwen2": ("Qwen2Config", True), "llama": ("LlamaConfig", False)}


@pytest.mark.slow
@pytest.mark.skipif(not QUESTIONS.exists(), reason="GSM8K questions are not on this machine")
@pytest.mark.parametrize(("teacher", "student"), [("qwen2", "llama"), ("llama", "qwen2")])
def test_gsm8k_goes_through_all_phases(tmp_path, teacher, student):
    for family, (config, tied) in FAMILIES.items():
        # The tokenizer is of bytes, so it takes any text, at several times the usual length.
        changes = {"tie_word_embeddings": tied, "max_position_embeddings": 4096}
        write_family_model(tmp_path / family, config, **changes)
    run = tmp_path / "run"
    overrides = [
        "experiment=gsm8k_qwen2.5",
        *(
            f"{role}.path={tmp_path / f}"
            for role, f in (("teacher", teacher), ("student", student))
        ),
        "teacher.dtype=float32",
        "student.dtype=float32",
        "teacher.sequence_parallel=false",
        "distributed_optimizer=false",
        "layout.teacher=2x1x1",
        "layout.student=1x1x1",
        f"data.train={QUESTIONS}",
        f"data.eval={QUESTIONS}",
        "data.eval_size=4",
        "num_prompts_per_step=4",
        "num_generations=4",
        "max_completion_length=48",
        "max_probe_tokens=32",
        "max_answer_tokens=48",
        "max_steps=2",
        "temperature=0.7",
        f"output_dir={run}",
    ]
    output = run_command(["bash", SCRIPT, *overrides], NPROC_PER_NODE="3", timeout=550)
    assert "separate: teacher 2x1x1" in output
    steps = [r for r in records(run) if "reward" in r]
    assert len(steps) == 2
    for record in steps:
        assert record["sampling/max"] < 1e-4  # at temperature 0.7 on both sides
        assert record["grad_norm"] >= 0
    assert {r["step"] for r in records(run, "completions")} == {1, 2}
    truths = {row["ground_truth"] for row in records(run, "completions")}
    assert all(truth.lstrip("-").replace(".", "").isdigit() for truth in truths)
    config = json.loads((run / "final" / "config.json").read_text())
    assert config["model_type"] == teacher
