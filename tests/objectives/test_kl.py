"""The estimators against the divergence itself, over a vocabulary small enough to add up."""

import pytest
import torch
from torch.nn.functional import kl_div

from grpo_mcore.objectives.advantages import compute_advantages
from grpo_mcore.objectives.kl import kl_estimate, kl_penalty

POLICY = torch.tensor([0.3, -1.2, 0.8, 0.0, 2.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.4, -0.5, 1.0, 0.9], dtype=torch.float64).log_softmax(0)


def log_policy():
    logits = POLICY.clone().requires_grad_()
    return logits, logits.log_softmax(0)


def gradient_of(value, logits):
    return torch.autograd.grad(value, logits)[0]


def divergence(policy, reference):
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_mean_is_the_divergence(estimator):
    _, policy = log_policy()
    mean = (policy.exp() * kl_estimate(policy, REFERENCE, estimator)).sum()
    assert mean.item() == pytest.approx(divergence(policy, REFERENCE).item(), abs=1e-12)


@pytest.mark.parametrize(
    "estimator, corrected, gradient",
    [
        ("k1", False, "none"),
        ("k2", False, "divergence"),
        ("k3", False, "opposite"),
        ("k1", True, "divergence"),
        ("k3", True, "divergence"),
    ],
)
def test_mean_gradient(estimator, corrected, gradient):
    logits, policy = log_policy()
    kl = kl_estimate(policy, REFERENCE, estimator)
    if corrected:
        kl = kl * (policy - policy.detach()).exp()
    found = gradient_of((policy.detach().exp() * kl).sum(), logits)
    logits, policy = log_policy()
    expected = {
        "none": 0 * policy.sum(),
        "divergence": divergence(policy, REFERENCE),
        "opposite": kl_div(policy, REFERENCE, reduction="sum", log_target=True),
    }
    torch.testing.assert_close(found, gradient_of(expected[gradient], logits))


def test_k3_is_never_negative_not_even_nearby_in_float32():
    policy = torch.linspace(-5, 0, 101)
    reference = policy + torch.linspace(-1e-4, 1e-4, 101)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    assert (kl_estimate(policy, reference + 1, "k3") > 0.5).all()


def test_penalty_adds_up_each_sequence():
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, torch.nan, -torch.inf]])
    reference = torch.tensor([[-1.5, -2.5, -1.0], [-1.25, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    assert kl_penalty(old, reference, mask, 0.1, "k1").tolist() == pytest.approx([0.1, 0.025])


def test_penalty_is_taken_from_the_reward():
    rewards = torch.tensor([[1.0], [1.0], [torch.nan], [0.0]])
    penalties = torch.tensor([0.2, 0.0, 5.0, 0.1])
    found = compute_advantages(rewards, 4, "none", penalties=penalties)
    mean = (0.8 + 1.0 - 0.1) / 3
    assert found.tolist() == pytest.approx([0.8 - mean, 1 - mean, 0, -0.1 - mean])
