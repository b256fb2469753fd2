"""Builds the Megatron model of one rank from a Hugging Face shape and loads its shard."""

import re
from functools import cache

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from grpo_mcore import device
from grpo_mcore.config import ModelConfig
from grpo_mcore.models.families import FAMILIES
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.rules import Columns, Replicated, Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square norm that tells Megatron to sum its gradient over sequence shards."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def transformer_config(shape: ModelShape, model: ModelConfig, role: Role) -> TransformerConfig:
    """Megatron's configuration of `shape` in the role's layout."""
    dtype = DTYPES[model.dtype]
    recompute = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        if model.recompute
        else {}
    )
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
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
        tensor_model_parallel_size=role.layout.tensor,
        pipeline_model_parallel_size=role.layout.pipeline,
        sequence_parallel=model.sequence_parallel and role.layout.tensor > 1,
        **recompute,
        **device.transformer_overrides(model.fp8),
    )


def load_model(shape: ModelShape, model: ModelConfig, role: Role, seed: int) -> GPTModel:
    """This rank's part of the model in `model.path`, on the device, with its weights."""
    model_parallel_cuda_manual_seed(
        seed + 100 * role.pipeline_rank,
        tp_rank=role.tensor_rank,
        ep_rank=0,
        etp_rank=0,
        force_reset_rng=True,
    )
    built = GPTModel(
        config=transformer_config(shape, model, role),
        transformer_layer_spec=_layer_spec(shape, role),
        vocab_size=shape.padded_vocab(role.layout.tensor),
        max_sequence_length=shape.positions,
        pre_process=role.is_first_stage,
        post_process=role.is_last_stage,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
        rope_scaling=shape.rope_scaling is not None,
        rope_scaling_factor=shape.rope_scaling or 1.0,
        pg_collection=role.groups,
    ).to(device.torch_device(), DTYPES[model.dtype])
    load_weights(built, shape, model, role)
    return built


@torch.no_grad()
def load_weights(built: GPTModel, shape: ModelShape, model: ModelConfig, role: Role) -> None:
    """Reads this rank's slices from disk into `built`, parameter by parameter."""
    reader = HFReader(model.path, DTYPES[model.dtype])
    rules = weight_rules(shape)
    for name, parameter in built.named_parameters():
        rule = rules[whole_name(name, shape, role)]
        shard = rule.shard(reader, role.tensor_rank, role.layout.tensor)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{model.path}: {rule} gives {tuple(shard.shape)} for {name}, "
                f"which is {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
        # Megatron marks what is sharded only when it initialises weights itself. Without the mark
        # the gradient norm counts one shard's parameters as if the others had the same.
        if not isinstance(rule, Replicated) and not hasattr(parameter, "tensor_model_parallel"):
            dim = 1 if isinstance(rule, Columns) else 0
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _layer_spec(shape: ModelShape, role: Role) -> ModuleSpec | TransformerBlockSubmodules:
    if device.uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if shape.qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (shape.layers // role.layout.pipeline), layer_norm=RMSNorm
    )


@cache
def weight_rules(shape: ModelShape) -> dict[str, Rule]:
    """Rules by parameter name over all stages, as the layers of this device name them."""
    return FAMILIES[shape.family].rules(shape, fused_norms=device.uses_transformer_engine())


def whole_name(local_name: str, shape: ModelShape, role: Role) -> str:
    """A stage's parameter name with its layer numbered over all stages.

    Raises:
        KeyError: when the parameter has no rule, which would leave it out of every sync.
    """
    first = role.pipeline_rank * (shape.layers // role.layout.pipeline)
    name = re.sub(
        r"^decoder\.layers\.(\d+)\.", lambda m: f"decoder.layers.{int(m[1]) + first}.", local_name
    )
    if name not in weight_rules(shape):
        raise KeyError(f"{shape.family}: no weight rule for Megatron parameter {name}")
    return name
