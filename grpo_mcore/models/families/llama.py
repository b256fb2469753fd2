"""Llama 2 and 3: the plain decoder that the other families vary."""

from collections.abc import Callable

from grpo_mcore.errors import ConfigError
from grpo_mcore.models.rope import read_rope
from grpo_mcore.models.rules import QKV, Columns, GateUp, Replicated, Rule, VocabRows
from grpo_mcore.models.shape import ModelShape

FeedForward = Callable[[ModelShape, int, bool], dict[str, Rule]]
"""(shape, layer, fused norms) -> the rules of the layer's second half."""


def shape(hf: dict, where: str, **variants) -> ModelShape:
    """ModelShape from a configuration as transformers completes it; `where` names the setting in
    errors."""
    if hf.get("attention_bias") and "qkv_bias" not in variants:
        raise ConfigError(f"{where}: attention_bias=true is not supported in this family")
    if hf.get("mlp_bias"):
        raise ConfigError(f"{where}: mlp_bias=true is not supported")
    if hf["hidden_act"] != "silu":
        raise ConfigError(f"{where}: hidden_act={hf['hidden_act']} is not supported; only silu")
    if hf.get("use_sliding_window"):
        raise ConfigError(f"{where}: use_sliding_window=true is not supported in this family")
    heads = hf["num_attention_heads"]
    rope_base, rope_scaling = read_rope(hf, where)
    sizes = {
        "family": hf["model_type"],
        "hidden": hf["hidden_size"],
        "ffn": hf["intermediate_size"],
        "layers": hf["num_hidden_layers"],
        "heads": heads,
        "groups": hf["num_key_value_heads"],
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "vocab": hf["vocab_size"],
        "positions": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "rope_base": rope_base,
        "rope_scaling": rope_scaling,
        "tied": hf["tie_word_embeddings"],
    }
    return ModelShape(**sizes | variants)


def rules(
    shape: ModelShape, fused_norms: bool, feed_forward: FeedForward | None = None
) -> dict[str, Rule]:
    """Megatron parameter name (layers numbered over all stages) -> its rule.

    Args:
        fused_norms: Transformer Engine keeps a norm's weight in the linear layer that follows it.
        feed_forward: the rules of a layer's second half, where it is not this family's.
    """
    found = {
        "embedding.word_embeddings.weight": VocabRows("model.embed_tokens.weight", shape.vocab)
    }
    for n in range(shape.layers):
        found |= attention_rules(shape, n, fused_norms)
        found |= (feed_forward or dense_rules)(shape, n, fused_norms)
    found["decoder.final_layernorm.weight"] = Replicated("model.norm.weight")
    head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
    found["output_layer.weight"] = VocabRows(head, shape.vocab)
    return found


def attention_rules(shape: ModelShape, n: int, fused_norms: bool) -> dict[str, Rule]:
    """The rules of layer `n`'s first half: norm, attention."""
    ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
    norm = (
        "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
    )
    found = {
        ours + norm: Replicated(theirs + "input_layernorm.weight"),
        ours + "self_attention.linear_qkv.weight": _qkv(shape, n, "weight"),
        ours + "self_attention.linear_proj.weight": Columns(theirs + "self_attn.o_proj.weight"),
    }
    if shape.qkv_bias:
        found[ours + "self_attention.linear_qkv.bias"] = _qkv(shape, n, "bias")
    if shape.qk_norm:
        for part in "qk":
            found[f"{ours}self_attention.{part}_layernorm.weight"] = Replicated(
                f"{theirs}self_attn.{part}_norm.weight"
            )
    return found


def dense_rules(shape: ModelShape, n: int, fused_norms: bool) -> dict[str, Rule]:
    """The rules of layer `n`'s second half: norm, gated feed-forward."""
    ours, theirs = f"decoder.layers.{n}.", f"model.layers.{n}."
    norm = "mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"
    return {
        ours + norm: Replicated(theirs + "post_attention_layernorm.weight"),
        ours + "mlp.linear_fc1.weight": GateUp(
            theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight"
        ),
        ours + "mlp.linear_fc2.weight": Columns(theirs + "mlp.down_proj.weight"),
    }


def _qkv(shape: ModelShape, n: int, kind: str) -> QKV:
    names = [f"model.layers.{n}.self_attn.{part}_proj.{kind}" for part in "qkv"]
    return QKV(*names, shape.groups, shape.heads // shape.groups, shape.head_dim)
