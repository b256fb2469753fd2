"""What a GPTModel is called with: tokens, and which of them attend to which."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from grpo_mcore.config import ModelConfig
from grpo_mcore.data.packing import boundaries, hidden_pairs
from grpo_mcore.errors import ConfigError
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import read_facts, uses_transformer_engine


def check_packing(key: str, shape: ModelShape, model: ModelConfig) -> None:
    """Checks that several documents in a row can be kept apart in `model`, section `key`.

    Raises:
        ConfigError: where they cannot.
    """
    if shape.window:
        raise ConfigError(
            f"packing=true: {key}.path={model.path} has layers with a sliding window, which cannot "
            "keep documents apart; leave it false"
        )
    if uses_transformer_engine(model, read_facts()) and model.dtype != "bfloat16":
        raise ConfigError(
            f"packing=true: Transformer Engine keeps documents apart in bfloat16 only; needs "
            f"{key}.dtype=bfloat16, not {model.dtype}, or {key}.layers=local"
        )


def plain_inputs(tokens: Tensor) -> dict:
    """Every token attends to itself and those before it. `tokens`: [sequences, tokens]."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": None}


def packed_inputs(tokens: Tensor, documents: Tensor, fused: bool) -> dict:
    """Every token attends to itself and those before it in its document.

    Args:
        documents: [sequences, tokens], as of `data.packing.number_documents`.
        fused: the layers are Transformer Engine's. These want the rows laid end to end, and so the
            model's output is of one sequence, too.
    """
    if not fused:
        return plain_inputs(tokens) | {"attention_mask": hidden_pairs(documents)}
    ends, longest = boundaries(documents), tokens.shape[1]
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        # Bounds; the true ones would have to be fetched from the device.
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return plain_inputs(tokens.reshape(1, -1)) | {"packed_seq_params": packed}
