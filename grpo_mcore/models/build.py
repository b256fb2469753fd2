"""Builds the Megatron model of one rank from a Hugging Face shape and loads its shard."""

from functools import cache

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import is_vp_first_stage, is_vp_last_stage
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import ModuleList

from grpo_mcore import device
from grpo_mcore.config import ModelConfig
from grpo_mcore.models.families import FAMILIES
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.layers import DTYPES, block_spec, transformer_config
from grpo_mcore.models.names import named_weights
from grpo_mcore.models.rope import inverse_frequencies
from grpo_mcore.models.rules import Columns, Replicated, Rule
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms, write_weight
from grpo_mcore.parallel.groups import Role


def load_model(shape: ModelShape, model: ModelConfig, role: Role, seed: int) -> ModuleList:
    """This rank's part of the model in `model.path`, with its weights, as of `build_model`."""
    chunks = build_model(shape, model, role, seed)
    load_weights(chunks, shape, model, role)
    return chunks


def build_model(shape: ModelShape, model: ModelConfig, role: Role, seed: int) -> ModuleList:
    """This rank's part of a model of `shape`, on the device; its weights are arbitrary.

    Returns:
        One GPTModel, or, in a virtual pipeline, one for each of the stage's chunks.
    """
    model_parallel_cuda_manual_seed(
        seed + 100 * role.pipeline_rank,
        tp_rank=role.tensor_rank,
        ep_rank=role.expert_rank,
        etp_rank=role.tensor_rank,
        force_reset_rng=True,
    )
    config = transformer_config(shape, model, role.layout)
    numbers = range(model.virtual_pipeline) if model.virtual_pipeline > 1 else (None,)
    chunks = ModuleList(_build_chunk(shape, config, role, number) for number in numbers)
    chunks.to(device.torch_device(), DTYPES[model.dtype])
    return chunks


def _build_chunk(
    shape: ModelShape, config: TransformerConfig, role: Role, number: int | None
) -> GPTModel:
    interleaved = config.virtual_pipeline_model_parallel_size
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(shape, config, role.pipeline_rank, number),
        vocab_size=shape.padded_vocab(role.layout.tensor),
        max_sequence_length=shape.positions,
        pre_process=role.is_first_stage and is_vp_first_stage(number, interleaved),
        post_process=role.is_last_stage and is_vp_last_stage(number, interleaved),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_base,
        pg_collection=role.groups,
        vp_stage=number,
    )
    rope = chunk.rotary_pos_emb
    frequencies = inverse_frequencies(shape.head_dim, shape.rope_base, shape.rope_scaling)
    rope.inv_freq = frequencies.to(rope.inv_freq)
    return chunk


@torch.no_grad()
def load_weights(chunks: ModuleList, shape: ModelShape, model: ModelConfig, role: Role) -> None:
    """Reads this rank's slices from disk into `chunks`, parameter by parameter."""
    reader = HFReader(model.path, DTYPES[model.dtype])
    rules = weight_rules(shape, fuses_norms(chunks))
    for name, parameter in named_weights(chunks, shape, role).items():
        if name not in rules:
            raise KeyError(f"{shape.family}: no weight rule for Megatron parameter {name}")
        rule = rules[name]
        shard = rule.shard(reader, role.tensor_rank, role.layout.tensor)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{model.path}: {rule} gives {tuple(shard.shape)} for {name}, "
                f"which is {tuple(parameter.shape)}"
            )
        write_weight(parameter, shard)
        # Megatron marks what is sharded only when it initialises weights itself. Without the mark
        # the gradient norm counts one shard's parameters as if the others had the same.
        if not isinstance(rule, Replicated) and not hasattr(parameter, "tensor_model_parallel"):
            dim = 1 if isinstance(rule, Columns) else 0
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


@cache
def weight_rules(shape: ModelShape, fused_norms: bool) -> dict[str, Rule]:
    """Rules by parameter name over all stages. `fused_norms`: as Transformer Engine's layers name
    them."""
    return FAMILIES[shape.family].rules(shape, fused_norms)
