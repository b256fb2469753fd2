"""Qwen3 with a mixture of experts, in all layers or in some."""

from grpo_mcore.models.families import llama
from grpo_mcore.models.families.mixtral import expert_rules
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape


def shape(hf: dict, where: str) -> ModelShape:
    every, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    return llama.shape(
        hf,
        where,
        qk_norm=True,
        ffn=hf["moe_intermediate_size"],
        # transformers 5 writes the second name where the released models have the first.
        experts=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        weigh_all_experts=not hf.get("norm_topk_prob", False),
        dense_layers=tuple(
            n for n in range(hf["num_hidden_layers"]) if n in dense or (n + 1) % every
        ),
        dense_ffn=hf["intermediate_size"],
    )


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    return llama.rules(shape, fused_norms, _feed_forward)


def _feed_forward(shape: ModelShape, n: int, fused_norms: bool) -> dict[str, Rule]:
    if not shape.has_experts(n):
        return llama.dense_rules(shape, n, fused_norms)
    return expert_rules(
        shape, n, fused_norms, block="mlp", gate="gate_proj", up="up_proj", down="down_proj"
    )
