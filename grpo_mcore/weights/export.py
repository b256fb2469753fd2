"""Writes a sharded model as a Hugging Face directory."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.models.hf_files import write_model
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

BUCKET_BYTES = 256 << 20


def export_model(
    chunks: ModuleList, shape: ModelShape, role: Role, directory: Path, like: str
) -> None:
    """Streams `chunks` into `directory`, with the configuration and tokenizer of `like`.
    Collective over the role; rank 0 writes."""
    weight = next(chunks.parameters())
    plan = make_plan(chunks, shape, role, BUCKET_BYTES, weight.element_size())
    buckets = stream_tensors(chunks, shape, plan, role)
    if role.rank == 0:
        write_model(_flatten(buckets), directory, like, plan.expected(weight.dtype))
    else:
        for _ in buckets:
            pass
    role.all_gather(None)  # nobody goes on before the directory is complete


def _flatten(buckets: Iterator[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for tensors in buckets:
        yield from tensors.items()
