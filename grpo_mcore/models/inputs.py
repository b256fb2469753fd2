"""What a GPTModel is called with: tokens, and which of them attend to which."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from grpo_mcore.data.packing import boundaries, hidden_pairs


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
