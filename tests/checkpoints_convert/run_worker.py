"""Trains for a step, saves the run's checkpoint, and exports the model.

torchrun --nproc-per-node 4 run_worker.py MODEL OUTPUT
"""

import sys
from pathlib import Path

from grpo_mcore.checkpoint.run import CheckpointWriter
from grpo_mcore.config import ModelConfig, TeacherGRPOConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join
from grpo_mcore.training.batch import pad_batch
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.export import export_model


def main() -> None:
    path, output = sys.argv[1], Path(sys.argv[2])
    model = ModelConfig(path, dtype="bfloat16")
    config = TeacherGRPOConfig(
        teacher=model, learning_rate=1e-2, distributed_optimizer=True, per_device_train_batch_size=2
    )
    shape = read_shape("model.path", path)
    batch = pad_batch([[5, 6], [7, 8]], [[9, 10, 11], [12, 13, 14]])
    with join({"policy": Layout(tensor=2, pipeline=2)}, "colocated", 120) as world:
        role = world.roles["policy"]
        policy = Policy(role, shape, model, config)
        policy.compute_gradients(batch, lambda log_probs, _, part: (-log_probs.mean(), {}))
        policy.step()
        writer = CheckpointWriter(policy, output / "checkpoints", path, config)
        writer.save(1, {})
        writer.finish()
        export_model(policy.chunks, shape, role, output / "exported", path)


if __name__ == "__main__":
    main()
