"""Models small enough to be made anew for every test session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A directory of random models with the demo's tokenizer, two layers each: `teacher` (the
    demo's own), and `qwen2`, `llama` and `qwen3` with their tied twins `qwen2_tied` and so on,
    whose biases and norms are random too, so that no mistake hides behind zeros and ones."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    from examples.demo.models import write_random_model

    root = tmp_path_factory.mktemp("models")
    write_random_model(root / "teacher", seed=0)
    for config in (Qwen2Config, LlamaConfig, Qwen3Config):
        for tied in (False, True):
            write_family_model(root / (config.model_type + "_tied" * tied), config, tied)
    return root


def write_family_model(
    directory: Path, config_class: type, tied: bool, positions: int = 128
) -> None:
    """A random model of `config_class`. Its vocabulary divides by no tensor parallel size, and
    Qwen3's heads are together wider than its hidden states, which only that family may be."""
    import torch
    from transformers import AutoModelForCausalLM

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer) + 1,
        hidden_size=96 if config_class.model_type == "qwen3" else 128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=160,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
