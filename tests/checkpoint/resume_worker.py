"""Trains, saves, goes on; then loads into a fresh policy and goes on again: both must be equal.

torchrun --nproc-per-node 4 resume_worker.py MODELS DIRECTORY
"""

import sys
from pathlib import Path

import torch

from grpo_mcore.checkpoint.run import load_checkpoint, save_checkpoint
from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.objectives.sft import sft_loss
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

CASES = {
    "plain": ("llama_tied", "float32", False),
    "plain_odd": ("qwen3_tied", "float32", False),
    "distributed": ("llama_tied", "float32", True),
    "distributed_odd": ("qwen3_tied", "float32", True),
    "distributed_bf16": ("llama_tied", "bfloat16", True),
}
"""Name -> model, weights' type, distributed optimizer. Sizes of the odd one are no multiples of
64."""


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(2, 500, (8, 12), generator=generator).tolist()
    made = pad_batch([row[:4] for row in rows], [row[4:] for row in rows])
    return made | {"weights": made["mask"] / made["mask"].sum()}


def loss(log_probs, part):
    share = sft_loss(log_probs, part["weights"])
    return share, {"loss": share}


def train(policy: Policy, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(policy.compute_gradients(batch(step), loss)["loss"])
        policy.step()
    return losses


def weights(policy: Policy, shape) -> dict:
    plan = make_plan(policy.chunks, shape, policy.role, 1 << 20, 4)
    streams = stream_tensors(policy.chunks, shape, plan, policy.role)
    return {k: v.clone() for tensors in streams for k, v in tensors.items()}


def main() -> None:
    models, directory = Path(sys.argv[1]), Path(sys.argv[2])
    layout = Layout(tensor=1, pipeline=2, data=2)
    with join({"policy": layout}, "colocated", 120) as world:
        role = world.roles["policy"]
        for name, (family, dtype, distributed) in CASES.items():
            model = ModelConfig(str(models / family), dtype=dtype)
            shape = read_shape("model.path", model.path)
            config = TrainingConfig(
                learning_rate=1e-2,
                lr_scheduler_type="linear",
                warmup_steps=2,
                max_steps=8,
                weight_decay=0.1,
                distributed_optimizer=distributed,
                per_device_train_batch_size=2,
            )
            policy = Policy(role, shape, model, config)
            train(policy, range(3))
            save_checkpoint(policy, 3, directory / name)
            expected = train(policy, range(3, 6)), weights(policy, shape)
            resumed = Policy(role, shape, model, config)
            step = load_checkpoint(resumed, directory / name)
            found = train(resumed, range(3, 6)), weights(resumed, shape)
            if role.rank == 0:
                result = {"expected": expected, "found": found, "step": step}
                torch.save(result | {"version": resumed.version}, directory / f"{name}.pt")


if __name__ == "__main__":
    main()
