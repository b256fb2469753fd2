"""Mistral: Llama whose attention reaches back over a sliding window."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.shape import ModelShape

rules = llama.rules


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(hf, where, window=hf["sliding_window"])
