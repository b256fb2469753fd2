"""Writes a random Qwen2-shaped model in bfloat16, for the benchmarks.

python tools/random_model.py 120M DIRECTORY [--tokenizer MODEL]
"""

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

SIZES = {
    "30M": {"hidden_size": 384, "num_hidden_layers": 4, "intermediate_size": 1024},
    "120M": {"hidden_size": 640, "num_hidden_layers": 14, "intermediate_size": 2560},
    "300M": {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 4096},
    "500M": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 5120},
}
"""Parameters, the output layer included -> what makes them."""
HEAD_DIM, GROUPS, VOCAB = 64, 2, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", help="a model whose tokenizer it is given")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    ends = {}
    if arguments.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer)
        tokenizer.save_pretrained(arguments.directory)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = SIZES[arguments.size]
    config = transformers.Qwen2Config(
        **sizes,
        **ends,
        num_attention_heads=sizes["hidden_size"] // HEAD_DIM,
        num_key_value_heads=GROUPS,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, p in model.named_parameters()
    }
    save_file(values, arguments.directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(arguments.directory)


if __name__ == "__main__":
    main()
