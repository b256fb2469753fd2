"""What Megatron makes of PEFT's adapters: logits, gradients, merged weights, a step of training.

torchrun --nproc-per-node 1 or 4 lora_worker.py MODELS OUTPUT

Adapters are read from OUTPUT/../reference/NAME/adapter. On four processes each case has its layout
of CASES, and dropout is looked at too. Rank 0 writes OUTPUT/NAME/ and OUTPUT/dropout.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.config.lora import read_lora_config
from grpo_mcore.models import lora as lora_module
from grpo_mcore.models.build import load_model
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.lora import adapter_rules, adapters_disabled, add_adapters
from grpo_mcore.models.transformer_engine import read_weight
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.training.policy import BaseReference, Policy, Reference
from grpo_mcore.training.split import Split
from grpo_mcore.weights.adapters import export_adapters
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan
from tests.models.lora_reference import CASES
from tests.models.parity_reference import parity_batch
from tests.models.parity_worker import compute_logits


def log_likelihood(log_probs, _, part):
    total = (log_probs * part["mask"]).sum() / parity_batch()["mask"].sum()
    return total, {"log_likelihood": total}


def negative_log_likelihood(log_probs, entropy, part):
    total, metrics = log_likelihood(log_probs, entropy, part)
    return -total, metrics


def gather(policy: Policy, pick, rules=None) -> dict[str, torch.Tensor]:
    """`pick` of every parameter of `rules`, as whole tensors."""
    plan = make_plan(policy.chunks, policy.shape, policy.role, 1 << 18, 4, rules)
    streams = stream_tensors(policy.chunks, policy.shape, plan, policy.role, pick)
    return {k: v.clone() for tensors in streams for k, v in tensors.items()}


def compute(role: Role, model: ModelConfig, adapter: Path, output: Path) -> dict:
    shape = read_shape("model.path", model.path)
    lora = read_lora_config("peft_config", adapter)
    config = TrainingConfig(per_device_train_batch_size=2, learning_rate=1e-2)
    policy = Policy(role, shape, model, config, lora)
    batch = parity_batch()
    policy.compute_gradients(batch, log_likelihood)
    rules = adapter_rules(shape, lora, fused_norms=False)
    found = {
        "gradients": gather(policy, lambda p: p.main_grad, rules),
        "logits": compute_logits(policy, batch),
    }
    with adapters_disabled(policy.chunks):
        found["base"] = compute_logits(policy, batch)
    export_model(policy.chunks, shape, role, output / "merged", model.path)
    export_adapters(policy.chunks, shape, role, lora, output / "copied", model.path)
    found["grad_norm"] = policy.step()["grad_norm"]
    found["trained_logits"] = compute_logits(policy, batch)
    found["weights"] = gather(policy, read_weight)
    export_adapters(policy.chunks, shape, role, lora, output / "trained", model.path)
    new = replace(lora, path=None)
    chunks = load_model(shape, model, role, seed=0)
    add_adapters(chunks, shape, role, new, seed=0)
    export_adapters(chunks, shape, role, new, output / "new", model.path)
    return found


class NormedLinear(torch.nn.Module):
    """Stands in for Transformer Engine's layer that begins with the norm before it."""

    def __init__(self, norm: torch.nn.Module, linear: torch.nn.Module):
        super().__init__()
        self.norm, self.linear = norm, linear
        self.layer_norm_weight, self.weight = norm.weight, linear.weight

    def forward(self, inputs):
        return self.linear(self.norm(inputs))


def compute_with_fused_norms(role: Role, model: ModelConfig, adapter: Path) -> torch.Tensor:
    """Logits of an adapted model whose norms are in the layers that follow them."""
    shape = read_shape("model.path", model.path)
    chunks = load_model(shape, model, role, seed=0)
    for layer in chunks[0].decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = NormedLinear(layer.input_layernorm, attention.linear_qkv)
        mlp.linear_fc1 = NormedLinear(layer.pre_mlp_layernorm, mlp.linear_fc1)
        layer.input_layernorm = layer.pre_mlp_layernorm = torch.nn.Identity()
    add_adapters(chunks, shape, role, read_lora_config("peft_config", adapter), seed=0)
    return compute_logits(
        SimpleNamespace(
            role=role, chunks=chunks, shape=shape, split=Split(role, model, TrainingConfig())
        ),
        parity_batch(),
    )


class Dropped:
    """Stands in for torch's dropout, and keeps what it dropped."""

    def __init__(self):
        self.masks: list[torch.Tensor] = []

    def __call__(self, inputs, probability):
        outputs = dropout(inputs, probability)
        self.masks.append(outputs == 0)
        return outputs


dropout = lora_module.dropout


def compute_with_dropout(role: Role, model: ModelConfig) -> dict:
    """What one pass drops on each rank, and how training goes."""
    shape = read_shape("model.path", model.path)
    lora = read_lora_config("peft_config", {"lora_dropout": 0.5, "target_modules": "all-linear"})
    config = TrainingConfig(per_device_train_batch_size=4, learning_rate=1e-2)
    policy = Policy(role, shape, model, config, lora)
    mine = {
        "stage": role.pipeline_rank,
        "reference": Reference(role, shape, model, config).log_probs(parity_batch(), 1.0),
        "base_reference": BaseReference(policy).log_probs(parity_batch(), 1.0),
    }
    likelihoods = []
    for step in range(4):
        lora_module.dropout = dropped = Dropped()
        metrics = policy.compute_gradients(parity_batch(), negative_log_likelihood)
        likelihoods.append(metrics["log_likelihood"])
        if step == 0:
            mine["masks"] = dropped.masks
            rules = adapter_rules(shape, lora, fused_norms=False)
            gradients = gather(policy, lambda p: p.main_grad, rules)
        policy.step()
    lora_module.dropout = dropout
    mine["log_probs"], mine["log_probs_again"] = (
        policy.log_probs(parity_batch())[0] for _ in range(2)
    )
    mine["replicated"] = {
        name: parameter.detach().clone()
        for name, parameter in policy.chunks.named_parameters()
        if parameter.requires_grad and not hasattr(parameter, "tensor_model_parallel")
    }
    return {"likelihoods": likelihoods, "gradients": gradients, "ranks": role.all_gather(mine)}


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    alone = output.name == "single"
    for name, (_, text, settings) in CASES.items():
        model = ModelConfig(str(models / name), **({} if alone else settings))
        layout = replace(
            Layout.parse("layout", "1x1x1" if alone else text), expert=model.expert_parallel
        )
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            adapter = output.parent / "reference" / name / "adapter"
            found = compute(role, model, adapter, output / name)
            if alone and name == "qwen2":
                found["fused_norms"] = compute_with_fused_norms(role, model, adapter)
            if role.rank == 0:
                torch.save(found, output / name / "found.pt")
    if alone:
        return
    with join({"policy": Layout(tensor=2, pipeline=2)}, "colocated", 120) as world:
        role, found = world.roles["policy"], {}
        for sequence_parallel in (False, True):
            for recompute in (None, "full"):
                model = ModelConfig(
                    str(models / "qwen2"), sequence_parallel=sequence_parallel, recompute=recompute
                )
                found[sequence_parallel, recompute] = compute_with_dropout(role, model)
        if role.rank == 0:
            torch.save(found, output / "dropout.pt")


if __name__ == "__main__":
    main()
