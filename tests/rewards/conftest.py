"""A reward model small enough to be made anew."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """The directory of a random sequence classifier with one label, whose tokenizer has a chat
    template."""
    import torch
    import transformers

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ mood }}\n{% endfor %}"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny-judge"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen2ForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
