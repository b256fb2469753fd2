"""Correction of rollouts, and what truncated sampling does to it."""

import math

import pytest
import torch

from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.errors import ConfigError
from grpo_mcore.objectives.correction import (
    correction_metrics,
    kept_log_mass,
    refuse_truncated_sampling,
    rollout_correction,
)
from grpo_mcore.objectives.metrics import combine

MASK = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
SAMPLING = torch.tensor([[-1.0, -2.0, -torch.inf], [-1.0, torch.nan, -3.0]])
RATIOS = torch.tensor([[2.0, 0.25, 7.0], [4.0, 9.0, 0.5]])
OLD = SAMPLING.nan_to_num(nan=-1.0, neginf=0.0) + RATIOS.log()


@pytest.mark.parametrize(
    "mode, bounds, expected",
    [
        ("token_truncate", (None, 3.0), [[2, 0.25, 1], [3, 1, 0.5]]),
        ("token_truncate", (0.5, 3.0), [[2, 0.5, 1], [3, 1, 0.5]]),
        ("token_mask", (None, 3.0), [[2, 0.25, 1], [0, 1, 0.5]]),
        ("token_mask", (0.4, None), [[2, 0, 1], [4, 1, 0.5]]),
        ("token_mask", (None, None), [[2, 0.25, 1], [4, 1, 0.5]]),
        ("sequence_truncate", (0.7, 1.5), [[0.7], [1.5]]),
        ("sequence_mask", (None, 1.5), [[0.5], [0]]),
    ],
)
def test_ratios_by_hand(mode, bounds, expected):
    found = rollout_correction(OLD, SAMPLING, MASK, mode, *bounds)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="vllm_importance_sampling_mode=clip: choose one of to"):
        rollout_correction(OLD, SAMPLING, MASK, "clip", None, 3.0)


@pytest.mark.parametrize("size", [1, 2])
def test_metrics_are_those_of_the_whole_however_it_is_split(size):
    parts = []
    for rows in torch.arange(2).split(size):
        columns = OLD[rows], SAMPLING[rows], MASK[rows]
        ratio = rollout_correction(*columns, "token_truncate", None, 3.0)
        metrics = correction_metrics(ratio, *columns)
        parts.append({name: value.tolist() for name, value in metrics.items()})
    found = combine(parts)
    gaps = [math.log(2), math.log(4), math.log(4), math.log(2)]
    assert found == pytest.approx(
        {
            "sampling_logp_difference/mean": sum(gaps) / 4,
            "sampling_logp_difference/max": math.log(4),
            "importance_sampling_ratio/min": 0.25,
            "importance_sampling_ratio/mean": (2 + 0.25 + 3 + 1 + 0.5) / 5,
            "importance_sampling_ratio/max": 3,
        },
        rel=1e-5,
    )


def test_part_without_tokens_has_no_metrics():
    ratio = rollout_correction(OLD, SAMPLING, 0 * MASK, "sequence_mask", None, 3.0)
    assert ratio.tolist() == [[1], [1]]
    assert correction_metrics(ratio, OLD, SAMPLING, 0 * MASK) == {}


TRUNCATIONS = [
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.7, "top_k": 4},
    {"top_p": 0.9, "top_k": 5, "min_p": 0.05},
    {"top_p": 1e-6},
]


def logits_of(rows=40, vocab=9):
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def kept_by_hand(row: list[float], top_p=1.0, top_k=0, min_p=0.0) -> set[int]:
    """min_p, then top_k, then top_p of what is left, from the likeliest down."""
    weights = [math.exp(x) for x in row]
    kept = [i for i, w in enumerate(weights) if w >= min_p * max(weights)]
    kept = sorted(kept, key=lambda i: -weights[i])[: top_k or None]
    total, mass, left = sum(weights[i] for i in kept), 0.0, set()
    for i in kept:
        left.add(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    return left


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_kept_mass_by_hand(truncation):
    logits = logits_of()
    for row, log_probs in zip(logits.tolist(), logits.log_softmax(-1).exp().tolist(), strict=True):
        kept = kept_by_hand(row, **truncation)
        for target in range(len(row)):
            found = kept_log_mass(torch.tensor(row), torch.tensor(target), **truncation)
            mass = sum(log_probs[i] for i in kept | {target})
            assert found.item() == pytest.approx(math.log(mass), abs=1e-6)


@pytest.mark.parametrize("truncation", [{"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.7, "top_k": 4}])
def test_kept_mass_is_that_of_vllm(truncation):
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits = logits_of().float()
    k = torch.full((len(logits),), truncation.get("top_k", logits.shape[1]))
    p = torch.full((len(logits),), truncation.get("top_p", 1.0))
    left = sampler.apply_top_k_top_p_pytorch(logits.clone(), k, p).isfinite()
    best = logits.argmax(-1)
    mass = (logits.softmax(-1) * left).sum(-1)
    torch.testing.assert_close(kept_log_mass(logits, best, **truncation).exp(), mass)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_renormalised_ratio_has_mean_1(truncation):
    """Over what the engine samples, when trainer and engine have the same weights; the plain ratio
    has the kept mass as its mean."""
    logits = logits_of()
    log_probs = logits.log_softmax(-1)
    vocab = logits.shape[1]
    targets = torch.arange(vocab).expand(len(logits), vocab)
    every = logits[:, None].expand(-1, vocab, -1)
    mass = kept_log_mass(every, targets, **truncation)
    kept = torch.zeros_like(log_probs, dtype=torch.bool)
    for place, row in enumerate(logits.tolist()):
        kept[place, list(kept_by_hand(row, **truncation))] = True
    engine = (log_probs.exp() * kept) / (log_probs.exp() * kept).sum(-1, keepdim=True)
    plain = (engine * (log_probs.exp() / engine.where(kept, 1.0))).sum(-1)
    assert (plain < 1).any()
    ratio = (log_probs - mass).exp() / engine.where(kept, 1.0)
    torch.testing.assert_close((engine * ratio).sum(-1), torch.ones(len(logits)).double())


def test_renormalised_log_probs_have_the_gradient_of_the_truncated_policy():
    logits = logits_of(rows=1)[0].requires_grad_()
    target = logits.argmax()
    kept = sorted(kept_by_hand(logits.tolist(), top_k=3))
    ours = logits.log_softmax(-1)[target] - kept_log_mass(logits, target, top_k=3)
    theirs = logits[kept].log_softmax(-1)[kept.index(target.item())]
    gradients = [torch.autograd.grad(value, logits)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_without_truncation_nothing_is_missing():
    logits = logits_of()
    found = kept_log_mass(logits, torch.zeros(len(logits), dtype=torch.long))
    torch.testing.assert_close(found, torch.zeros(len(logits)).double())


@pytest.mark.parametrize(
    "key, value, plain", [("top_p", 0.9, "1.0"), ("top_k", 50, "0"), ("min_p", 0.05, "0.0")]
)
def test_truncated_sampling_is_refused_while_correcting(key, value, plain):
    sampling = {"top_p": 1.0, "top_k": 0, "min_p": None}
    refuse_truncated_sampling(ObjectiveConfig(), **sampling)
    sampling[key] = value
    with pytest.raises(ConfigError, match=f"{key}={value}: .*; set {key}={plain}, or vllm_import"):
        refuse_truncated_sampling(ObjectiveConfig(), **sampling)
    refuse_truncated_sampling(
        ObjectiveConfig(vllm_importance_sampling_correction=False), **sampling
    )
