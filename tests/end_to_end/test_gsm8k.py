"""Real questions through all phases, with models of real shapes but random weights."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT, SCRIPT, records, run_command

QUESTIONS = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(not QUESTIONS.exists(), reason="GSM8K questions are not on this machine")
@pytest.mark.parametrize(("teacher", "student"), [("qwen2", "llama"), ("llama", "qwen2")])
def test_gsm8k_goes_through_all_phases(tmp_path, teacher, student):
    for family in (teacher, student):
        _write_model(tmp_path / family, family)
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


def _write_model(directory: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()  # of bytes, so it takes any text, at four times the length
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family](
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=4096,
        tie_word_embeddings=family == "qwen2",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
