"""Trains a teacher for a step, then asks it of its student, on every rank of a job, and before and
after it what cannot be answered; prints what each was told, as a JSON line.

torchrun ... diagnosis_worker.py TEACHER STUDENT OUTPUT_DIR
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

from grpo_mcore import ModelConfig, TeacherGRPOConfig, TeacherGRPOTrainer
from grpo_mcore.config import ConfigError, LayoutConfig, RolloutConfig
from tests.teaching.conftest import LENGTHS, TASK, TEMPLATES


def refusal(ask: Callable) -> str:
    """Why `ask` fails; "" where it does not."""
    try:
        ask()
    except ConfigError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    teacher, student, output_dir = sys.argv[1:]
    config = TeacherGRPOConfig(
        teacher=ModelConfig(teacher),
        student=ModelConfig(student),
        layout=LayoutConfig(placement="separate", teacher="1x1x1", student="1x1x1"),
        templates=TEMPLATES,
        rollout=RolloutConfig(kv_cache_gib=0.05, deadline_seconds=240),
        output_dir=output_dir,
        max_steps=1,
        num_prompts_per_step=2,
        num_generations=2,
        per_device_train_batch_size=4,
        learning_rate=1e-9,
        **LENGTHS,
    )
    rows = [{"question": f"tom has {n} cards.", "answer": str(n)} for n in range(3, 9)]
    trainer = TeacherGRPOTrainer(config, train_dataset=rows)
    refused = [refusal(lambda: trainer.diagnostic_probe(TASK * 30))]
    trainer.train()
    refused += [
        refusal(lambda: trainer.diagnostic_probe(TASK * 30)),
        refusal(lambda: trainer._generate_baseline_solutions([TASK * 30])),
    ]
    diagnosis = trainer.diagnostic_probe(TASK, 12)
    guidance = trainer.generate_guidance(TASK, diagnosis, 24)
    again = trainer.diagnostic_probe(TASK, 12)
    told = {
        "diagnosis": asdict(diagnosis),
        "guidance": guidance,
        "same": again == diagnosis,
        "refused": refused,
    }
    print(f"rank {os.environ['RANK']}: {json.dumps(told)}", flush=True)


if __name__ == "__main__":
    main()
