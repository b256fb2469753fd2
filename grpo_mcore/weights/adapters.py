"""Writes a model's LoRA adapters, and nothing else, as PEFT does."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import ModuleList

from grpo_mcore.config import LoraConfig
from grpo_mcore.config.lora import ADAPTER_CONFIG
from grpo_mcore.models.hf_files import new_directory, total_bytes
from grpo_mcore.models.lora import WEIGHTS, adapter_rules
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fuses_norms
from grpo_mcore.parallel.groups import Role
from grpo_mcore.weights.export import BUCKET_BYTES
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan


def export_adapters(
    chunks: ModuleList,
    shape: ModelShape,
    role: Role,
    lora: LoraConfig,
    directory: Path,
    base: str,
) -> None:
    """Gathers the adapters of `chunks` and writes them into `directory`, which they replace.
    Collective over the role; rank 0, which holds them all, writes.

    Args:
        lora: what the adapters were made from.
        base: the model they adapt, as `peft.PeftModel` is to find it.

    Raises:
        FilesError: on every rank, when they cannot be written.
    """
    rules = adapter_rules(shape, lora, fuses_norms(chunks))
    element = chunks[0].config.params_dtype.itemsize
    plan = make_plan(chunks, shape, role, BUCKET_BYTES, element, rules)
    held = {}
    for tensors in stream_tensors(chunks, shape, plan, role):
        if role.rank == 0:
            for name, tensor in tensors.items():
                held[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    options = {k: v for k, v in asdict(lora).items() if k != "path"} | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
    }

    def write() -> None:
        with new_directory(directory, total_bytes(held)) as work:
            save_file(held, work / WEIGHTS, metadata={"format": "pt"})
            (work / ADAPTER_CONFIG).write_text(json.dumps(options, indent=2) + "\n")

    role.once(write)
