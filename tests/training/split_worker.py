"""One batch's log-probabilities and gradients, in micro-batches of several kinds.

torchrun --nproc-per-node 4 split_worker.py MODELS OUTPUT

Rank 0 writes OUTPUT, a file: case -> budget -> what was computed.
"""

import sys
from pathlib import Path

import torch

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.training.batch import Batch, pad_batch
from grpo_mcore.training.policy import Policy, Reference
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

CASES = {
    "TP 2, DP 2": ("qwen2_tied", Layout(2, 1, 2), {"sequence_parallel": True}),
    "PP 2, DP 2": ("qwen2_tied", Layout(1, 2, 2), {}),
    "TP 2, VPP": ("qwen2_tied", Layout(2, 2, 1), {"virtual_pipeline": 2}),
    "EP 2, DP 4": ("qwen3_moe_mixed", Layout(1, 1, 4, 2), {}),
    "EP 2, VPP": ("qwen3_moe_mixed", Layout(1, 2, 2, 2), {"virtual_pipeline": 2}),
}
"""Name -> model, layout, its settings."""
BUDGETS = (None, 1, 40, 100, 10_000)
"""The first is what the others are compared with."""
TEMPERATURE = 0.2
LENGTHS = (21, 5, 30, 9, 7, 28, 6, 31, 12, 5, 19, 8, 26, 11, 6, 17)


def ragged_batch(multiple: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 500, (n,), generator=generator).tolist() for n in LENGTHS]
    batch = pad_batch([row[:3] for row in rows], [row[3:] for row in rows], multiple)
    batch["mask"][-1] = 0
    batch["weights"] = batch["mask"] / batch["mask"].sum()
    batch["advantages"] = torch.randn(len(rows), generator=generator)
    return batch


def loss(log_probs, entropy, part):
    share = ((part["advantages"][:, None] * log_probs + entropy) * part["weights"]).sum()
    return share, {
        "loss": share,
        "log_probs": mean_of(log_probs, part["mask"]),
        "lowest/min": log_probs.masked_fill(part["mask"] == 0, 0).min(),
    }


def compute(role: Role, model: ModelConfig, budget: int | None) -> dict:
    shape = read_shape("model.path", model.path)
    config = TrainingConfig(per_device_train_batch_size=2, max_tokens_per_micro_batch=budget)
    policy = Policy(role, shape, model, config)
    batch = ragged_batch(policy.length_multiple)
    if budget:  # the last row counts for nothing; without it ranks have unequal numbers of rows
        batch = {name: tensor[:-1] for name, tensor in batch.items()}
    metrics = policy.compute_gradients(batch, loss)
    plan = make_plan(policy.chunks, shape, role, 1 << 18, 4)
    streams = stream_tensors(policy.chunks, shape, plan, role, lambda p: p.main_grad)
    gradients = {k: v.clone() for tensors in streams for k, v in tensors.items()}
    log_probs, entropies = policy.log_probs(batch, TEMPERATURE)
    whole = {
        "log_probs": log_probs,
        "entropies": entropies,
        "reference": Reference(role, shape, model, config).log_probs(batch, TEMPERATURE),
    }
    parts = [tuple(part["tokens"].shape) for part in policy.split.micro_batches(batch)]
    return {
        "metrics": metrics,
        "gradients": gradients,
        "ranks": role.all_gather((role.is_last_stage, parts, whole)),
        "mask": batch["mask"],
    }


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict = {}
    for name, (family, layout, settings) in CASES.items():
        model = ModelConfig(str(models / family), expert_parallel=layout.expert, **settings)
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            found[name] = {budget: compute(role, model, budget) for budget in BUDGETS}
            if role.rank == 0:
                torch.save(found, output)


if __name__ == "__main__":
    main()
