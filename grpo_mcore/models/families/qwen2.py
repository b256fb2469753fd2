"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(hf, where, qkv_bias=True)


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    found = llama.rules(shape, fused_norms)
    for n in range(shape.layers):
        found[f"decoder.layers.{n}.self_attention.linear_qkv.bias"] = llama.qkv(
            shape, f"model.layers.{n}.self_attn.", "bias"
        )
    return found
