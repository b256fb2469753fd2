"""Log-likelihoods by a model spread over two ranks in each way, beside those given.

    torchrun --nproc-per-node 2 layouts_worker.py MODEL FILE

FILE is a JSON list of [prompt's tokens, completion's tokens, log-likelihood].
"""

import json
import sys
from pathlib import Path

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join
from grpo_mcore.training.likelihood import FrozenModel

LAYOUTS = {
    "2x1x1": {"sequence_parallel": True},
    "1x2x1": {"virtual_pipeline": 2},
    "1x1x2": {},
}


def main() -> None:
    path, given = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    prompts, completions, expected = zip(*given, strict=True)
    shape = read_shape("model", path)
    layouts = {name: Layout.parse("layout", name) for name in LAYOUTS}
    with join(layouts, "colocated", 120) as world:
        for name, role in world.roles.items():
            for tokens in (None, 150):
                config = TrainingConfig(
                    per_device_train_batch_size=2, max_tokens_per_micro_batch=tokens
                )
                model = FrozenModel(role, shape, ModelConfig(path, **LAYOUTS[name]), config)
                found = model.log_likelihoods(prompts, completions)
                differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
                if role.rank == 0:
                    print("difference", name, tokens, max(differences), len(found))


if __name__ == "__main__":
    main()
