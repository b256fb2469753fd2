"""Qwen3: Llama with a norm on each query and key head, and a head size of its own."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.rules import Replicated, Rule
from grpo_mcore.models.shape import ModelShape


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(hf, where, qk_norm=True)


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    found = llama.rules(shape, fused_norms)
    for n in range(shape.layers):
        for part in "qk":
            found[f"decoder.layers.{n}.self_attention.{part}_layernorm.weight"] = Replicated(
                f"model.layers.{n}.self_attn.{part}_norm.weight"
            )
    return found
