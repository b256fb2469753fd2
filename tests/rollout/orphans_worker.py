"""A job whose engine has two workers, to be ended in every way there is.

torchrun --nproc-per-node 2 orphans_worker.py OUTPUT success|error|kill
"""

import sys
from dataclasses import replace
from pathlib import Path

from tests.trainers.grpo_jobs import job, text_reward, trainer_of


def reward_that_fails(**_) -> list[float]:
    raise LookupError("no reward today")


def main() -> None:
    output, end = Path(sys.argv[1]), sys.argv[2]
    steps = 1 if end == "success" else 10_000
    config = job(output / "model", output / "run", layout="2x1x1", max_steps=steps)
    config.rollout = replace(
        config.rollout, policy_engines=1, policy_tensor_parallel=2, max_engine_restarts=0
    )
    trainer_of(config, reward_that_fails if end == "error" else text_reward).train()


if __name__ == "__main__":
    main()
