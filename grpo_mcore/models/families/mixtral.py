"""Mixtral: Mistral with a mixture of experts in every layer."""

from functools import partial

from grpo_mcore.models.families import llama
from grpo_mcore.models.rules import Columns, GateUp, Replicated, Rule
from grpo_mcore.models.shape import ModelShape


def shape(hf: dict, where: str) -> ModelShape:
    return llama.shape(
        hf,
        where,
        window=hf["sliding_window"],
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    block = partial(expert_rules, block="block_sparse_moe", gate="w1", up="w3", down="w2")
    return llama.rules(shape, fused_norms, block)


def expert_rules(
    shape: ModelShape, n: int, fused_norms: bool, block: str, gate: str, up: str, down: str
) -> dict[str, Rule]:
    """The rules of layer `n`'s second half: norm, router, experts. No norm is fused here: the
    router reads its output too.

    Args:
        block, gate, up, down: what the family calls the mixture and an expert's three matrices.
    """
    ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
    found = {
        ours + "pre_mlp_layernorm.weight": Replicated(theirs + "post_attention_layernorm.weight"),
        ours + "mlp.router.weight": Replicated(f"{theirs}{block}.gate.weight"),
    }
    for e in range(shape.experts):
        expert, their_expert = f"{ours}mlp.experts.{e}.", f"{theirs}{block}.experts.{e}."
        found[expert + "linear_fc1.weight"] = GateUp(
            f"{their_expert}{gate}.weight", f"{their_expert}{up}.weight"
        )
        found[expert + "linear_fc2.weight"] = Columns(f"{their_expert}{down}.weight")
    return found
