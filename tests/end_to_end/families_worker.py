"""Gives engines other weights than they started with, and compares what both sides say then.

torchrun --nproc-per-node N families_worker.py OVERRIDES... [adapters | merged]

The weights are others because they are scaled or, with "adapters" and "merged", because adapters
were added, which engines are sent as they are or merged.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from grpo_mcore.config import LoraConfig
from grpo_mcore.config.compose import compose_config
from grpo_mcore.models.build import load_model
from grpo_mcore.models.lora import add_adapters
from grpo_mcore.parallel.world import join, world_size
from grpo_mcore.preflight.teaching_job import check_job
from grpo_mcore.rollout.requests import Request
from grpo_mcore.steps.teaching_engines import start_role_engines
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.pipeline import compute_log_probs
from grpo_mcore.training.split import Split
from grpo_mcore.weights.sync import WeightSync

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    trained = sys.argv[-1] in ("adapters", "merged")
    overrides = sys.argv[1:-1] if trained else sys.argv[1:]
    lora = LoraConfig() if sys.argv[-1] == "adapters" else None
    config = compose_config(ROOT / "examples/configs", "demo", overrides)
    config, job = check_job(config, world_size())
    with join(job.layouts, job.placement, 120) as world:
        role, shape = world.roles["teacher"], job.shapes["teacher"]
        config.rollout.lora_sync = "adapters" if lora else "merged"
        pool = start_role_engines(role, replace(config, peft_config=lora), job)
        chunks = load_model(shape, config.teacher, role, 0)
        if trained:
            add_adapters(chunks, shape, role, LoraConfig(), seed=0)
        pool.wait_until_ready()
        sync = WeightSync(chunks, shape, role, pool, 1, lora)
        for version in (1, 2):
            with torch.no_grad():
                for parameter in (p for p in chunks.parameters() if p.requires_grad):
                    parameter.add_(0.03) if trained else parameter.mul_(1.05)
            sent = sync.push(version)

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
            print("second sync", sent["tensors"])
        pool.close()


if __name__ == "__main__":
    main()
