"""Qwen3: Llama with a norm on each query and key head, and a head size of its own."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.shape import ModelShape

rules = llama.rules


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(hf, where, qk_norm=True)
