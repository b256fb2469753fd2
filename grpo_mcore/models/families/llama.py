"""Llama 2 and 3: the plain decoder that the other families vary."""

from grpo_mcore.errors import ConfigError
from grpo_mcore.models.rules import QKV, Columns, GateUp, Replicated, Rule, VocabRows
from grpo_mcore.models.shape import ModelShape

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The only parameters of "llama3" rope scaling that Megatron-Core has, besides the factor."""


def shape(hf: dict, where: str, **variants) -> ModelShape:
    """ModelShape from the contents of config.json; `where` names the setting in errors."""
    if hf.get("attention_bias") and "qkv_bias" not in variants:
        raise ConfigError(f"{where}: attention_bias=true is not supported in this family")
    if hf.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias=true is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{where}: hidden_act={hf['hidden_act']} is not supported; only silu")
    if hf.get("use_sliding_window"):
        raise ConfigError(f"{where}: use_sliding_window=true is not supported")
    heads = hf["num_attention_heads"]
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    return ModelShape(
        family=hf["model_type"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        groups=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab=hf["vocab_size"],
        positions=hf.get("max_position_embeddings", 2048),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_base=rope.get("rope_theta") or hf.get("rope_theta", 10000.0),
        rope_scaling=_rope_scaling(rope, where),
        tied=hf.get("tie_word_embeddings", False),
        **variants,
    )


def _rope_scaling(rope: dict, where: str) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConfigError(f"{where}: rope_type={kind} is not supported; only default and llama3")
    for key, value in LLAMA3_ROPE.items():
        if rope.get(key) != value:
            raise ConfigError(
                f"{where}: rope {key}={rope.get(key)}; Megatron-Core has only {value}"
            )
    return rope["factor"]


def rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    """Megatron parameter name (layers numbered over all stages) -> its rule.

    Args:
        fused_norms: Transformer Engine keeps a norm's weight in the linear layer that follows it.
    """
    found = {
        "embedding.word_embeddings.weight": VocabRows("model.embed_tokens.weight", shape.vocab)
    }
    for n in range(shape.layers):
        found |= layer_rules(shape, f"decoder.layers.{n}.", f"model.layers.{n}.", fused_norms)
    found["decoder.final_layernorm.weight"] = Replicated("model.norm.weight")
    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    found["output_layer.weight"] = VocabRows(head, shape.vocab)
    return found


def layer_rules(shape: ModelShape, ours: str, theirs: str, fused_norms: bool) -> dict[str, Rule]:
    """The rules of one layer; `ours` and `theirs` are the name prefixes on either side."""
    norm1, norm2 = (
        ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        if fused_norms
        else ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    )
    attention = theirs + "self_attn."
    return {
        ours + norm1: Replicated(theirs + "input_layernorm.weight"),
        ours + "self_attention.linear_qkv.weight": qkv(shape, attention, "weight"),
        ours + "self_attention.linear_proj.weight": Columns(attention + "o_proj.weight"),
        ours + norm2: Replicated(theirs + "post_attention_layernorm.weight"),
        ours + "mlp.linear_fc1.weight": GateUp(
            theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"
        ),
        ours + "mlp.linear_fc2.weight": Columns(theirs + "mlp.down_proj.weight"),
    }


def qkv(shape: ModelShape, attention: str, kind: str) -> QKV:
    """The rule of a layer's fused query, key and value `kind` ("weight" or "bias")."""
    names = [f"{attention}{part}_proj.{kind}" for part in "qkv"]
    return QKV(*names, shape.groups, shape.heads // shape.groups, shape.head_dim)
