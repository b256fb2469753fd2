"""What Megatron makes of each model in a directory: logits, gradients, the model exported again.

torchrun --nproc-per-node 1 or 4 parity_worker.py MODELS OUTPUT

On four processes each model has its layout of FAMILY_MODELS. Rank 0 writes OUTPUT/NAME.pt and
OUTPUT/NAME. On one process every model is also loaded with wrong rules.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.models import build
from grpo_mcore.models.families import FAMILIES, read_shape
from grpo_mcore.models.rules import QKV, GateUp, Rule
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


def compute(role: Role, shape: ModelShape, model: ModelConfig) -> tuple[dict, Policy]:
    """Logits, and gradients of the mean of all log-probabilities by Hugging Face name."""
    batch = parity_batch()
    policy = Policy(role, shape, model, TrainingConfig(per_device_train_batch_size=2))

    def log_likelihood(log_probs, _, part):
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
        policy.split.micro_batches(batch),
        lambda part, logits: (logits.sum() * 0, logits.detach().clone()),
        forward_only=True,
    )
    at = role.tensor_rank, role.data_rank
    held = {at: torch.cat(p) for at, p in role.all_gather((at, parts)) if p}
    layout = role.layout
    rows = [torch.cat([held[t, d] for t in range(layout.tensor)], -1) for d in range(layout.data)]
    return torch.cat(rows)[..., : policy.shape.vocab]


def swapped_gate(rule: Rule) -> Rule:
    return replace(rule, gate=rule.up, up=rule.gate) if isinstance(rule, GateUp) else rule


def swapped_key(rule: Rule) -> Rule:
    return replace(rule, key=rule.value, value=rule.key) if isinstance(rule, QKV) else rule


@contextmanager
def broken(family: ModuleType, fault: Callable[[Rule], Rule]) -> Iterator[None]:
    """Rules of `family` with `fault` while it lasts."""
    rules = family.rules
    family.rules = lambda *args: {name: fault(rule) for name, rule in rules(*args).items()}
    build.weight_rules.cache_clear()
    yield
    family.rules = rules
    build.weight_rules.cache_clear()


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    for name, (*_, text, settings) in FAMILY_MODELS.items():
        path = str(models / name)
        shape = read_shape("model.path", path)
        alone = output.name == "single"
        model = ModelConfig(path, **({} if alone else settings))
        layout = replace(
            Layout.parse("layout", "1x1x1" if alone else text), expert=model.expert_parallel
        )
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            found, policy = compute(role, shape, model)
            export_model(policy.chunks, shape, role, output / name, path)
            found["grad_norm"] = policy.step()["grad_norm"]
            for fault in (swapped_gate, swapped_key) if alone else ():
                with broken(FAMILIES[shape.family], fault):
                    found[fault.__name__] = compute(role, shape, model)[0]
            if role.rank == 0:
                torch.save(found, output / f"{name}.pt")


if __name__ == "__main__":
    main()
