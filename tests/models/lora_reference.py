"""What PEFT makes of each case of `CASES`, in a process that never imports Megatron.

python lora_reference.py make MODELS OUTPUT       writes random adapters and what they do
python lora_reference.py load MODELS DIRECTORY..  computes logits with the adapters in DIRECTORY
"""

import sys
from pathlib import Path

import torch

from tests.models.parity_reference import parity_batch

CASES = {
    "qwen2": ({"target_modules": "all-linear"}, "2x2x1", {"sequence_parallel": True}),
    "llama": (
        {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "use_rslora": True},
        "2x1x2", {"recompute": "selective"},
    ),
    "qwen3_tied": (
        {"target_modules": ["k_proj", "o_proj", "gate_proj"], "lora_alpha": 3},
        "2x2x1", {"sequence_parallel": True, "recompute": "full"},
    ),
    "qwen2_tied": (
        {"target_modules": ["down_proj"]}, "1x2x2", {"virtual_pipeline": 2, "recompute": "full"},
    ),
    "qwen3_moe": (
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "2x1x2", {"expert_parallel": 2, "sequence_parallel": True},
    ),
}  # fmt: skip
"""Model -> PEFT's options beside the rank, which is 4; a layout of four processes, settings."""


def make(models: Path, output: Path) -> None:
    from peft import LoraConfig, get_peft_model

    batch = parity_batch()
    for name, (options, *_) in CASES.items():
        torch.manual_seed(1)
        base = load_base(models / name)
        found = {"base": base(batch["tokens"]).logits.detach()}
        model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for parameter in adapters.values():
            torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(output / name / "adapter")
        logits = model(batch["tokens"]).logits
        table = logits[:, :-1].log_softmax(-1)
        table.gather(-1, batch["tokens"][:, 1:, None]).mean().backward()
        found["logits"] = logits.detach()
        found["gradients"] = {n.replace(".default", ""): p.grad for n, p in adapters.items()}
        torch.save(found, output / name / "found.pt")
        model.merge_and_unload().save_pretrained(output / name / "merged")


def load(models: Path, *directories: Path) -> None:
    from peft import PeftModel

    for directory in directories:
        for name in CASES:
            trained = directory / name / "trained"
            model = PeftModel.from_pretrained(load_base(models / name), trained)
            with torch.no_grad():
                logits = model(parity_batch()["tokens"]).logits
            torch.save(logits, directory / name / "peft_logits.pt")


def load_base(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:]))
