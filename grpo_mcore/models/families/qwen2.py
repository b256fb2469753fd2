"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.shape import ModelShape

rules = llama.rules


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(hf, where, qkv_bias=True)
