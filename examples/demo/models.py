"""Random weights and data for the demo, in the formats any Hugging Face user has on disk.

Both models have the Qwen2 shape, 0.44 M parameters. Two layers and two key-value heads divide by
TP2 x PP2; a head size of 32 is the smallest that vLLM's CPU attention accepts.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.demo import problems
from examples.demo.tokenizer import build_tokenizer

SFT_ROWS = 32_000
"""500 steps of 64 rows; below 400 steps the student is not yet reliable."""


def write_random_model(directory: str | Path, seed: int) -> None:
    """An untrained model with its tokenizer, loadable by `AutoModelForCausalLM` and by vLLM."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        max_position_embeddings=128,
        rope_theta=10_000.0,
        initializer_range=0.02,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_data(directory: str | Path, seed: int) -> None:
    """The five data files; the two evaluation sets are the same for every seed."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    train = problems.train_questions(seed)
    heldout = problems.heldout_questions()
    unseen = problems.unseen_wording_questions()
    _write_jsonl(directory / "student_sft.jsonl", problems.student_sft_rows(seed, SFT_ROWS))
    _write_jsonl(directory / "teacher_sft.jsonl", problems.teacher_sft_rows(seed, SFT_ROWS))
    _write_jsonl(directory / "train.jsonl", map(problems.rl_row, train))
    _write_jsonl(directory / "heldout.jsonl", map(problems.rl_row, heldout))
    _write_jsonl(directory / "unseen_wordings.jsonl", map(problems.rl_row, unseen))


def _write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
