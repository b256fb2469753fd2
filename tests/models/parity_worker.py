"""What Megatron makes of each model in a directory: logits, gradients, the model exported again.

torchrun --nproc-per-node 1 or 4 parity_worker.py MODELS OUTPUT

On four processes each model has a layout of its own, chosen to be awkward for it. Rank 0 writes
OUTPUT/NAME.pt and OUTPUT/NAME. On one process every model is also loaded with one rule broken.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models import build
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.rules import GateUp
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.training.pipeline import run_pipeline
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan
from tests.conftest import FAMILY_MODELS
from tests.models.parity_reference import parity_batch

LAYOUTS = {
    "llama": ("2x1x2", {"sequence_parallel": True}),
    "llama_tied": ("2x2x1", {"recompute": "full"}),
    "llama3": ("1x4x1", {"recompute": "selective"}),
    "mistral": ("2x2x1", {"virtual_pipeline": 2, "sequence_parallel": True}),
    "mixtral": ("2x1x2", {"expert_parallel": 2, "sequence_parallel": True}),
    "qwen2": ("2x2x1", {}),
    "qwen2_tied": ("1x2x2", {"virtual_pipeline": 2}),
    "qwen3": ("2x2x1", {"sequence_parallel": True, "recompute": "selective"}),
    "qwen3_tied": ("2x2x1", {"sequence_parallel": True}),
    "qwen3_moe": ("1x2x2", {"expert_parallel": 2}),
    "qwen3_moe_mixed": ("1x2x2", {"expert_parallel": 2, "virtual_pipeline": 2}),
}
"""Name -> layout and settings on four processes."""


def compute(role: Role, shape: ModelShape, model: ModelConfig) -> tuple[dict, Policy]:
    """Logits, and gradients of the mean of all log-probabilities by Hugging Face name."""
    batch = parity_batch()
    policy = Policy(role, shape, model, TrainingConfig(per_device_train_batch_size=2))

    def log_likelihood(log_probs, part):
        total = (log_probs * part["mask"]).sum() / batch["mask"].sum()
        return total, {"log_likelihood": total}

    policy.compute_gradients(batch, log_likelihood)
    plan = make_plan(policy.chunks, shape, role, 1 << 18, 4)
    streams = stream_tensors(policy.chunks, shape, plan, role, lambda p: p.main_grad)
    gradients = {k: v.clone() for tensors in streams for k, v in tensors.items()}
    return {"logits": compute_logits(policy, batch), "gradients": gradients}, policy


def compute_logits(policy: Policy, batch: dict) -> torch.Tensor:
    """[sequences, tokens, vocabulary] on every rank."""
    role = policy.role
    parts = run_pipeline(
        policy.chunks,
        role,
        policy.micro_batches(batch),
        lambda part, logits: (logits.sum() * 0, logits.detach().clone()),
        forward_only=True,
    )
    at = role.tensor_rank, role.data_rank
    held = {at: torch.cat(p) for at, p in role.all_gather((at, parts)) if p}
    layout = role.layout
    rows = [torch.cat([held[t, d] for t in range(layout.tensor)], -1) for d in range(layout.data)]
    return torch.cat(rows)[..., : policy.shape.vocab]


def break_a_rule(shape: ModelShape) -> None:
    """Takes the last gate for the up projection, and the other way round."""
    rules = build.weight_rules(shape, False)
    name, rule = [(n, r) for n, r in rules.items() if isinstance(r, GateUp)][-1]
    rules[name] = replace(rule, gate=rule.up, up=rule.gate)


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    for name in FAMILY_MODELS:
        path = str(models / name)
        shape = read_shape("model.path", path)
        text, settings = LAYOUTS[name]
        if output.name == "single":
            text, settings = "1x1x1", {}
        model = ModelConfig(path, **settings)
        layout = replace(Layout.parse("layout", text), expert=model.expert_parallel)
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            found, policy = compute(role, shape, model)
            export_model(policy.chunks, shape, role, output / name, path)
            if output.name == "single":
                break_a_rule(shape)
                found["broken"] = compute(role, shape, model)[0]
            if role.rank == 0:
                torch.save(found, output / f"{name}.pt")


if __name__ == "__main__":
    main()
