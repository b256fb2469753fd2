"""One batch's log-probabilities and gradients, in micro-batches of several kinds.

torchrun --nproc-per-node 4 split_worker.py MODELS OUTPUT

Rank 0 writes OUTPUT, a file: case -> budget -> what was computed; and OUTPUT.packed, what was
computed of documents in rows of their own and packed together; and OUTPUT.mixed, a reference that
was mixed with what.
"""

import os
import sys
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch

from grpo_mcore.config import ModelConfig, TrainingConfig
from grpo_mcore.data.packing import number_documents
from grpo_mcore.models.families import read_shape
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.training.batch import Batch, pad_batch
from grpo_mcore.training.policy import Policy, Reference
from grpo_mcore.weights.gather import stream_tensors
from grpo_mcore.weights.plan import make_plan
from tests.models.parity_worker import compute_logits

CASES = {
    "TP 2, DP 2": ("qwen2_tied", Layout(2, 1, 2), {"sequence_parallel": True}),
    "PP 2, DP 2": ("qwen2_tied", Layout(1, 2, 2), {}),
    "TP 2, VPP": ("qwen2_tied", Layout(2, 2, 1), {"virtual_pipeline": 2}),
    "EP 2, DP 4": ("qwen3_moe_mixed", Layout(1, 1, 4, 2), {}),
    "EP 2, VPP": ("qwen3_moe_mixed", Layout(1, 2, 2, 2), {"virtual_pipeline": 2}),
}
"""Name -> model, layout, its settings."""
BUDGETS = (None, 1, 40, 100, 10_000)
"""The first is what the others are compared with."""
TEMPERATURE = 0.2
LENGTHS = (21, 5, 30, 9, 7, 28, 6, 31, 12, 5, 19, 8, 26, 11, 6, 17)


ALPHA = 0.3
PACKED = ((7, 5), (9,), (3, 4, 6), (12, 1))
"""Lengths of documents, row by row."""


def ragged_batch(multiple: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 500, (n,), generator=generator).tolist() for n in LENGTHS]
    batch = pad_batch([row[:3] for row in rows], [row[3:] for row in rows], multiple)
    batch["mask"][-1] = 0
    batch["weights"] = batch["mask"] / batch["mask"].sum()
    batch["advantages"] = torch.randn(len(rows), generator=generator)
    return batch


def loss(log_probs, entropy, part):
    share = ((part["advantages"][:, None] * log_probs + entropy) * part["weights"]).sum()
    return share, {
        "loss": share,
        "log_probs": mean_of(log_probs, part["mask"]),
        "lowest/min": log_probs.masked_fill(part["mask"] == 0, 0).min(),
    }


def compute(role: Role, model: ModelConfig, budget: int | None) -> dict:
    shape = read_shape("model.path", model.path)
    config = TrainingConfig(per_device_train_batch_size=2, max_tokens_per_micro_batch=budget)
    policy = Policy(role, shape, model, config)
    batch = ragged_batch(policy.length_multiple)
    if budget:  # the last row counts for nothing; without it ranks have unequal numbers of rows
        batch = {name: tensor[:-1] for name, tensor in batch.items()}
    metrics = policy.compute_gradients(batch, loss)
    gradients = whole_gradients(policy)
    log_probs, entropies = policy.log_probs(batch, TEMPERATURE)
    whole = {
        "log_probs": log_probs,
        "entropies": entropies,
        "reference": Reference(role, shape, model, config).log_probs(batch, TEMPERATURE),
    }
    parts = [tuple(part["tokens"].shape) for part in policy.split.micro_batches(batch)]
    return {
        "metrics": metrics,
        "gradients": gradients,
        "ranks": role.all_gather((role.is_last_stage, parts, whole)),
        "mask": batch["mask"],
    }


def whole_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    return whole(policy.chunks, policy, lambda p: p.main_grad)


def whole(chunks: torch.nn.ModuleList, policy: Policy, pick) -> dict[str, torch.Tensor]:
    """What `pick` takes of each parameter of chunks like the policy's, by Hugging Face name."""
    plan = make_plan(policy.chunks, policy.shape, policy.role, 1 << 18, 4)
    streams = stream_tensors(chunks, policy.shape, plan, policy.role, pick)
    return {k: v.clone() for tensors in streams for k, v in tensors.items()}


def document_batches(multiple: int) -> tuple[Batch, Batch]:
    """The documents of PACKED each in a row of its own, and packed."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        [torch.randint(2, 500, (n,), generator=generator).tolist() for n in lengths]
        for lengths in PACKED
    ]
    texts = [text for row in rows for text in row]
    alone = pad_batch([text[:1] for text in texts], [text[1:] for text in texts], multiple)
    joined = [list(chain(*row)) for row in rows]
    packed = pad_batch([row[:1] for row in joined], [row[1:] for row in joined], multiple)
    for row, lengths in enumerate(PACKED):
        packed["mask"][row, [end - 1 for end in accumulate(lengths)]] = 0
    packed["documents"] = number_documents(PACKED, packed["tokens"].shape[1])
    for batch in (alone, packed):
        batch["weights"] = batch["mask"] / batch["mask"].sum()
    return alone, packed


class PackedAttention(torch.nn.Module):
    """Stands in for Transformer Engine's attention over rows laid end to end."""

    def forward(self, query, key, value, attention_mask, packed_seq_params, **_):
        """[tokens, heads * width] from [tokens, heads or groups, width]."""
        assert attention_mask is None and packed_seq_params.qkv_format == "thd"
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert ends[-1] == len(query)
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, a:b], key[:, a:b], value[:, a:b], is_causal=True, enable_gqa=True
            )
            for a, b in pairwise(ends)
        ]
        return torch.cat(parts, 1).transpose(0, 1).flatten(1)


def likelihood(log_probs, _, part):
    share = (log_probs * part["weights"]).sum()
    return share, {"loss": share}


def compute_packed(role: Role, model: ModelConfig) -> dict:
    """Logits of each document and gradients: alone, packed in Megatron's own layers, and packed as
    for Transformer Engine's."""
    shape = read_shape("model.path", model.path)
    found = {}
    for kind in ("alone", "packed", "end to end"):
        config = TrainingConfig(per_device_train_batch_size=1 if kind == "alone" else 2)
        policy = Policy(role, shape, model, config)
        batch = document_batches(policy.length_multiple)[kind != "alone"]
        if kind == "end to end":
            for layer in (layer for chunk in policy.chunks for layer in chunk.decoder.layers):
                layer.self_attention.core_attention = PackedAttention()
            policy.chunks[0].config.transformer_impl = "transformer_engine"
        metrics = policy.compute_gradients(
            batch,
            lambda log_probs, _, part: ((s := (log_probs * part["weights"]).sum()), {"loss": s}),
        )
        logits = compute_logits(policy, batch)
        policy.chunks[0].config.transformer_impl = "local"
        places = [[n] for n in chain(*PACKED)] if kind == "alone" else PACKED
        texts = [
            logits[row, end - n : end]
            for row, lengths in enumerate(places)
            for n, end in zip(lengths, accumulate(lengths), strict=True)
        ]
        found[kind] = {"logits": texts, "gradients": whole_gradients(policy), **metrics}
    return found


def compute_mixed(role: Role, model: ModelConfig) -> dict:
    """A reference before and after it was mixed twice with a policy in training; the policies."""
    shape = read_shape("model.path", model.path)
    config = TrainingConfig(per_device_train_batch_size=2, learning_rate=1e-2)
    policy, reference = Policy(role, shape, model, config), Reference(role, shape, model, config)
    found = {"before": whole(reference.chunks, policy, lambda p: p.data), "policies": []}
    for _ in range(2):
        policy.compute_gradients(ragged_batch(policy.length_multiple), loss)
        policy.step()
        reference.mix(policy, ALPHA)
        found["policies"].append(whole(policy.chunks, policy, lambda p: p.data))
    return found | {"after": whole(reference.chunks, policy, lambda p: p.data)}


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict = {}
    for name, (family, layout, settings) in CASES.items():
        model = ModelConfig(str(models / family), expert_parallel=layout.expert, **settings)
        with join({"policy": layout}, "colocated", 120) as world:
            role = world.roles["policy"]
            found[name] = {budget: compute(role, model, budget) for budget in BUDGETS}
            if role.rank == 0:
                torch.save(found, output)
    packed, mixed = {}, None
    for layout in (Layout(2, 2, 1), Layout()):
        if int(os.environ["RANK"]) < layout.size:
            os.environ["WORLD_SIZE"] = str(layout.size)
            model = ModelConfig(
                str(models / "qwen2_tied"), sequence_parallel=True, recompute="selective"
            )
            with join({"policy": layout}, "colocated", 120) as world:
                packed[str(layout)] = compute_packed(world.roles["policy"], model)
                mixed = mixed or compute_mixed(world.roles["policy"], model)
    if int(os.environ["RANK"]) == 0:
        torch.save(packed, f"{output}.packed")
        torch.save(mixed, f"{output}.mixed")


if __name__ == "__main__":
    main()
