"""Qwen3 with a mixture of experts, in all layers or in some."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.families.mixtral import expert_rules
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape


def shape(hf: dict, where: str) -> ModelShape:
    every, dense = hf["decoder_sparse_step"], hf["mlp_only_layers"]
    dense_layers = tuple(n for n in range(hf["num_hidden_layers"]) if n in dense or (n + 1) % every)
    return llama.shape(
        hf,
        where,
        qk_norm=True,
        ffn=hf["moe_intermediate_size"],
        experts=hf["num_local_experts"],  # transformers' name for what the model calls num_experts
        experts_per_token=hf["num_experts_per_tok"],
        weigh_all_experts=not hf["norm_topk_prob"],
        dense_layers=dense_layers,
        dense_ffn=hf["intermediate_size"] if dense_layers else 0,
    )


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    return llama.rules(shape, fused_norms, _feed_forward)


def _feed_forward(shape: ModelShape, n: int, fused_norms: bool) -> dict[str, Rule]:
    if not shape.has_experts(n):
        return llama.dense_rules(shape, n, fused_norms)
    return expert_rules(
        shape, n, fused_norms, block="mlp", gate="gate_proj", up="up_proj", down="down_proj"
    )
