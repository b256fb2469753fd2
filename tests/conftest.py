"""Models small enough to be made anew for every test session."""

from pathlib import Path

import pytest

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}
FAMILY_MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 5}),
    "mistral": ("MistralConfig", {"sliding_window": 5, "num_hidden_layers": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_tied": ("Qwen2Config", {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "qwen3": ("Qwen3Config", {"hidden_size": 96}),
    "qwen3_tied": ("Qwen3Config", {"hidden_size": 96, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_mixed": (
        "Qwen3MoeConfig",
        {
            "moe_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "num_hidden_layers": 4,
            "tie_word_embeddings": True,
        },
    ),
}
"""Name -> transformers' configuration class, and what it has otherwise than `write_family_model`
gives all. Every family is there, and every odd shape: a vocabulary no tensor parallel size divides,
5 layers, tied embeddings, windows shorter than the text, heads together wider than the hidden
states (where hidden_size is 96)."""


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Path:
    """A directory of random models with the demo's tokenizer: `teacher` (the demo's own) and those
    of FAMILY_MODELS."""
    from examples.demo.models import write_random_model

    root = tmp_path_factory.mktemp("models")
    write_random_model(root / "teacher", seed=0)
    for name, (config, changes) in FAMILY_MODELS.items():
        write_family_model(root / name, config, **changes)
    return root


def write_family_model(directory: Path, config_class: str, **changes) -> None:
    """A random model whose configuration has `changes`. Its biases and norms are random too, so
    that no mistake hides behind zeros and ones."""
    import torch
    import transformers

    from examples.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer) + 1,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 160,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": torch.float32,
    }
    config = getattr(transformers, config_class)(**sizes | changes)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
