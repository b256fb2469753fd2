"""Runs micro-batches through Megatron's pipeline schedule."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore import device
from grpo_mcore.models.inputs import packed_inputs, plain_inputs
from grpo_mcore.models.log_probs import log_probs_and_entropy
from grpo_mcore.models.transformer_engine import share_scales
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.batch import Batch
from grpo_mcore.training.split import Split

OnOutput = Callable[[Batch, Tensor], tuple[Tensor, object]]
"""(micro-batch, logits [sequences, tokens, vocabulary / TP]) -> (loss, anything to collect)."""


def run_pipeline(
    chunks: ModuleList,
    role: Role,
    parts: list[Batch],
    on_output: OnOutput,
    forward_only: bool,
) -> list:
    """Forward (and backward) over micro-batches.

    Args:
        chunks: the parts of the model that this rank's pipeline stage holds, bare or in DDP.

    Returns:
        What `on_output` collected for each micro-batch on the last stage; [] on other stages.
    """
    config = get_model_config(chunks[0])
    if config.fp8:
        share_scales(role.groups)
    sequences, length = shape = parts[0]["tokens"].shape
    # Stages then tell each other the shape before what they send. Megatron's constructor refuses
    # this for one kind of experts, which it does not harm.
    config.variable_seq_lengths = any(part["tokens"].shape != shape for part in parts)
    fused = config.transformer_impl == "transformer_engine"
    if fused and "documents" in parts[0]:
        sequences, length = 1, sequences * length  # see packed_inputs

    def forward_step(iterator, model):
        part = {name: t.to(device.torch_device()) for name, t in next(iterator).items()}
        if "documents" in part:
            inputs = packed_inputs(part["tokens"], part["documents"], fused)
        else:
            inputs = plain_inputs(part["tokens"])
        return model(**inputs), partial(collect, part)

    def collect(part: Batch, logits: Tensor):
        return on_output(part, logits.view(*part["tokens"].shape, -1))

    # One stage talks to nobody; Megatron wants the communicator exactly when there are several.
    several = role.layout.pipeline > 1
    interleaved = config.virtual_pipeline_model_parallel_size
    with torch.set_grad_enabled(not forward_only):
        return get_forward_backward_func(pp_size=role.layout.pipeline, vp_size=interleaved)(
            forward_step_func=forward_step,
            data_iterator=[iter(parts) for _ in chunks] if interleaved else iter(parts),
            model=list(chunks) if interleaved else chunks[0],
            num_microbatches=len(parts),
            seq_length=length,
            micro_batch_size=sequences,
            forward_only=forward_only,
            pg_collection=role.groups,
            **({"p2p_communicator": P2PCommunicator(role.groups.pp, config)} if several else {}),
        )


def compute_log_probs(
    chunks: ModuleList, split: Split, batch: Batch, vocab: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the batch's own tokens and entropies at their places, without gradient
    or dropout.

    Returns:
        Two tensors [sequences, tokens] of the whole batch, on every rank of the last stage; zeros
        on the others. What stands at padding means nothing.
    """
    role = split.role

    def on_output(part: Batch, logits: Tensor):
        targets = part["tokens"].roll(-1, dims=1)  # the last column is always masked
        both = log_probs_and_entropy(logits, targets, vocab, temperature, role.groups.tp)
        return both[0].sum() * 0, torch.stack(both).cpu()

    chunks.eval()
    collected = run_pipeline(chunks, role, split.micro_batches(batch), on_output, forward_only=True)
    if not role.is_last_stage:
        return torch.zeros(2, *batch["tokens"].shape).unbind()
    return split.join(batch, collected).unbind()
