"""Megatron's configuration of a model, and the modules its layers are made of."""

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from grpo_mcore import device
from grpo_mcore.config import ModelConfig
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import read_facts, transformer_fields
from grpo_mcore.parallel.grid import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMPUTE = {
    None: {},
    "full": {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    },
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}  # fmt: skip


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm that tells Megatron to sum its gradient over sequence shards."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(shape: ModelShape, model: ModelConfig, layout: Layout) -> TransformerConfig:
    """Megatron's configuration of `shape` in `layout`."""
    dtype = DTYPES[model.dtype]
    layers = transformer_fields(model, read_facts())
    fused = layers["transformer_impl"] == "transformer_engine"
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.dense_ffn or shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        # Positions a token reaches before and after its own.
        window_size=(shape.window - 1, 0) if shape.window else None,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=model.sequence_parallel and layout.tensor > 1,
        **_stage_sizes(shape, layout.pipeline),
        **_interleaved(model.virtual_pipeline),
        **_experts(shape, layout, fused),
        **RECOMPUTE[model.recompute],
        **layers,
        **device.transformer_overrides(),
    )


def block_spec(
    shape: ModelShape, config: TransformerConfig, stage: int, chunk: int | None
) -> TransformerBlockSubmodules:
    """The layers of pipeline stage `stage`; with a virtual pipeline, of its chunk `chunk`."""
    first = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage)
    count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage)
    fused = config.transformer_impl == "transformer_engine"
    layer = _fused_layer if fused else _local_layer
    kinds = {experts: layer(shape, experts) for experts in (False, True)}
    specs = [kinds[shape.has_experts(n)] for n in range(first, first + count)]
    if fused:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _fused_layer(shape: ModelShape, experts: bool) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.experts if experts else None,
        moe_grouped_gemm=experts,
        qk_layernorm=shape.qk_norm,
    )


def _local_layer(shape: ModelShape, experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=shape.experts if experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if shape.qk_norm:
        attention = parts.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts:
        # In checkpoints norms bear the names Transformer Engine gives them, which fuses this one
        # into a dense layer only.
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    return layer


def _stage_sizes(shape: ModelShape, stages: int) -> dict:
    sizes = shape.stage_layers(stages)
    if len(set(sizes)) == 1:
        return {}
    return {
        "num_layers_in_first_pipeline_stage": sizes[0],
        "num_layers_in_last_pipeline_stage": sizes[-1],
    }


def _interleaved(chunks: int) -> dict:
    if chunks == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": chunks,
        # Two stages are each other's next and previous at once; batched, their messages mix.
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _experts(shape: ModelShape, layout: Layout, fused: bool) -> dict:
    if not shape.experts:
        return {}
    frequency = [int(shape.has_experts(n)) for n in range(shape.layers)]
    return {
        "num_moe_experts": shape.experts,
        "moe_ffn_hidden_size": shape.ffn,
        "moe_router_topk": shape.experts_per_token,
        "moe_router_pre_softmax": shape.weigh_all_experts,
        # Nothing but the loss moves the router; its balance is not a target of ours.
        "moe_router_load_balancing_type": "none",
        "moe_layer_freq": frequency if shape.dense_layers else 1,
        "moe_grouped_gemm": fused,
        # gloo has no all-to-all of uneven parts.
        "moe_token_dispatcher_type": "alltoall" if device.is_cuda() else "allgather",
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.tensor,
    }
