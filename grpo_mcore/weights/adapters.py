"""Writes a model's LoRA adapters, and nothing else, as PEFT does."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.config import LoraConfig
from grpo_mcore.config.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo_mcore.models.hf_files import new_directory, total_bytes
from grpo_mcore.models.lora import adapter_rules
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms
from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.export import BUCKET_BYTES
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import Plan, make_plan


def export_adapters(
    chunks: ModuleList,
    shape: ModelShape,
    role: Role,
    lora: LoraConfig,
    directory: Path,
    base: str,
) -> None:
    """Gathers the adapters of `chunks` and writes them into `directory`, which they replace.
    Collective over the role; rank 0 writes.

    Args:
        lora: what the adapters were made from.
        base: the model they adapt, as `peft.PeftModel` is to find it.

    Raises:
        FilesError: on every rank, when they cannot be written.
    """
    held = gather_adapters(chunks, shape, role, plan_adapters(chunks, shape, role, lora))

    def write() -> None:
        with new_directory(directory, total_bytes(held)) as work:
            write_adapters(held, lora, work, base)

    role.once(write)


def plan_adapters(chunks: ModuleList, shape: ModelShape, role: Role, lora: LoraConfig) -> Plan:
    """How the adapters of `chunks` are gathered. Collective over the role."""
    rules = adapter_rules(shape, lora, fuses_norms(chunks))
    element = chunks[0].config.params_dtype.itemsize
    return make_plan(chunks, shape, role, BUCKET_BYTES, element, rules)


def gather_adapters(
    chunks: ModuleList, shape: ModelShape, role: Role, plan: Plan
) -> dict[str, Tensor]:
    """PEFT's tensors of the adapters of `chunks`, in host memory, on every rank. Collective over
    the role."""
    streams = stream_tensors(chunks, shape, plan, role)
    return {name: tensor.cpu() for tensors in streams for name, tensor in tensors.items()}


def write_adapters(
    tensors: dict[str, Tensor], lora: LoraConfig, directory: Path, base: str
) -> None:
    """Writes adapters as PEFT does into `directory`, which is there."""
    options = {k: v for k, v in asdict(lora).items() if k != "path"} | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (directory / ADAPTER_CONFIG).write_text(json.dumps(options, indent=2) + "\n")
