"""Gives engines other weights than they started with, and compares what both sides say then.

torchrun --nproc-per-node N families_worker.py OVERRIDES... [adapters]

The weights are others because they are scaled or, with "adapters", because adapters were added.
"""

import sys
from pathlib import Path

import torch

from grpo_mcore.config import LoraConfig
from grpo_mcore.config.compose import compose_config
from grpo_mcore.models.build import load_model
from grpo_mcore.models.lora import add_adapters
from grpo_mcore.parallel.world import join, world_size
from grpo_mcore.rollout.requests import Request
from grpo_mcore.trainers.preflight import check_job
from grpo_mcore.trainers.teacher_grpo import start_role_engines
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.pipeline import compute_log_probs
from grpo_mcore.training.split import Split
from grpo_mcore.weights.sync import WeightSync

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    adapters = sys.argv[-1] == "adapters"
    overrides = sys.argv[1:-1] if adapters else sys.argv[1:]
    config = compose_config(ROOT / "examples/configs", "demo", overrides)
    config, job = check_job(config, world_size())
    with join(job.layouts, job.placement, 120) as world:
        role, shape = world.roles["teacher"], job.shapes["teacher"]
        pool = start_role_engines(role, config, job)
        chunks = load_model(shape, config.teacher, role, 0)
        if adapters:
            add_adapters(chunks, shape, role, LoraConfig(), seed=0)
        with torch.no_grad():
            for parameter in (p for p in chunks.parameters() if p.requires_grad):
                parameter.add_(0.05) if adapters else parameter.mul_(1.05)
        pool.wait_until_ready()
        WeightSync(chunks, shape, role, pool, 1).push(1)

        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(2, 500, (4, 20), generator=generator).tolist()
        requests = [Request(prompt, 12, seed) for seed, prompt in enumerate(prompts)]
        completions = pool.generate(requests)
        batch = pad_batch(prompts, [c.tokens for c in completions])
        split = Split(role, config.teacher, config)
        found, _ = compute_log_probs(chunks, split, batch, shape.vocab, 1.0)
        expected = torch.tensor([x for c in completions for x in c.log_probs])
        difference = (found[batch["mask"].bool()] - expected).abs().max().item()
        if role.rank == 0:
            print("largest difference", difference)
        pool.close()


if __name__ == "__main__":
    main()
