"""What models compute on one GPU with the layers and the optimizer of a case.

torchrun --nproc-per-node 1 layers_worker.py CASE OUTPUT MODEL...

Writes OUTPUT/NAME.pt for every MODEL directory: loss and gradients, and the weights as loaded and
after a step, by Hugging Face name.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from grpo_mcore import device
from grpo_mcore.config import ConfigError, ModelConfig, TrainingConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.transformer_engine import (
    RECIPES,
    check_layers,
    read_facts,
    read_weight,
)
from grpo_mcore.objectives.sft import sft_loss
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.preflight.settings import check_optimizer
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan

BLOCKY = [recipe for recipe in RECIPES if recipe != "delayed"]
"""Recipes whose scales come from the values themselves."""
CASES: dict[str, tuple[dict, dict]] = {
    "local": ({"layers": "local"}, {}),
    "fused": ({"layers": "transformer_engine"}, {}),
    "sharded": ({}, {"distributed_optimizer": True}),
    **{
        f"offloaded_{fraction}": (
            {},
            {"distributed_optimizer": True, "optimizer_offload_fraction": fraction},
        )
        for fraction in (0.5, 1.0)
    },
    **{recipe: ({"fp8": recipe}, {}) for recipe in RECIPES},
    **{f"{recipe}_recomputed": ({"fp8": recipe, "recompute": "full"}, {}) for recipe in RECIPES},
    **{
        f"{recipe}_inner": (
            {"fp8": recipe, "bf16_layers_at_start": 1, "bf16_layers_at_end": 1},
            {},
        )
        for recipe in BLOCKY
    },
    **{
        f"{recipe}_held": (
            {"fp8": recipe, "fp8_param": True},
            {"distributed_optimizer": True},
        )
        for recipe in BLOCKY
    },
}
"""Name -> settings of the model and of the training, besides bfloat16."""
PASSES = 3
"""Backward passes before the gradients are taken: recipe "delayed" has its scales from earlier
ones. The others compute the same each time."""


def configure(case: str, path: str) -> tuple[ModelConfig, TrainingConfig]:
    model, training = CASES[case]
    return (
        ModelConfig(path, dtype="bfloat16", **model),
        TrainingConfig(learning_rate=1e-3, per_device_train_batch_size=4, **training),
    )


def refusal(case: str) -> str | None:
    """Why the case cannot run on this machine; None where it can."""
    model, training = configure(case, "model")
    try:
        check_layers("model", model, read_facts())
        check_optimizer(training, "model", model, read_facts())
    except ConfigError as error:
        return str(error)
    return None


def gpu_batch() -> dict[str, Tensor]:
    """8 sequences of 64 tokens; all count alike but the last, which predicts nothing."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 500, (8, 64), generator=generator)
    mask = torch.ones(8, 64)
    mask[:, -1] = 0
    return {"tokens": tokens, "mask": mask, "weights": mask / mask.sum()}


def compute(role: Role, case: str, path: str) -> dict:
    shape = read_shape("model.path", path)
    policy = Policy(role, shape, *configure(case, path))
    plan = make_plan(policy.chunks, shape, role, 1 << 20, 4)

    def stream(pick: Callable[[Parameter], Tensor]) -> dict[str, Tensor]:
        streams = stream_tensors(policy.chunks, shape, plan, role, pick)
        return {k: v.float().cpu() for tensors in streams for k, v in tensors.items()}

    def loss(log_probs, _, part):
        share = sft_loss(log_probs, part["weights"])
        return share, {"loss": share}

    found = {"loaded": stream(read_weight)}
    for _ in range(PASSES):
        found["loss"] = policy.compute_gradients(gpu_batch(), loss)["loss"]
    found["gradients"] = stream(lambda parameter: parameter.main_grad)
    policy.step()
    found["stepped"] = stream(read_weight)
    return found


def main() -> None:
    case, output, *paths = sys.argv[1:]
    with join({"policy": Layout()}, "colocated", 120) as world:
        role = world.roles["policy"]
        processes = torch.ones(1, device=device.torch_device())
        dist.all_reduce(processes, group=role.everyone)
        for path in paths:
            found = compute(role, case, path) | {"processes": processes.item()}
            torch.save(found, Path(output) / f"{Path(path).name}.pt")


if __name__ == "__main__":
    main()
