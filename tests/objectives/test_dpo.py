"""The preference loss by hand."""

import math

import pytest
import torch

from grpo_mcore.objectives.dpo import dpo_loss, sequence_log_probs
from grpo_mcore.objectives.metrics import combine


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def draw(pairs):
    generator = torch.Generator().manual_seed(0)
    drawn = -5 * torch.rand(4, pairs, generator=generator, dtype=torch.float64)
    return drawn.requires_grad_()


@pytest.mark.seed(63)
def test_one_pair():
    values = torch.tensor([[-1.0], [-3.0], [-2.0], [-1.5]])
    margin = 0.5 * ((-1 + 2) - (-3 + 1.5))
    for smoothing in (0.0, 0.1):
        loss, metrics = dpo_loss(*values, torch.ones(1), 0.5, smoothing)
        expected = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
        assert loss.item() == pytest.approx(expected)
    found = combine([{name: value.tolist() for name, value in metrics.items()}])
    assert found == pytest.approx(
        {
            "loss": expected,
            "rewards/chosen": 0.5,
            "rewards/rejected": -0.75,
            "rewards/accuracies": 1,
            "rewards/margins": 1.25,
            "logps/chosen": -1,
            "logps/rejected": -3,
        }
    )


def test_policy_that_is_the_reference_costs_log_2():
    same = torch.tensor([-1.0, -2.0])
    loss, metrics = dpo_loss(same, same - 1, same, same - 1, torch.full((2,), 0.5))
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["rewards/accuracies"].tolist() == [0, 2]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_splitting_the_batch_changes_nothing(size):
    values = draw(5)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    losses, gradients = [], []
    for parts in ([torch.arange(5)], torch.arange(5).split(size)):
        loss = sum(dpo_loss(*values[:, rows], weights[rows], 0.3, 0.1)[0] for rows in parts)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, values)[0])
    assert losses[0] == pytest.approx(losses[1], abs=1e-15)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-15)


def test_a_pair_of_no_weight_does_not_count():
    values, weights = draw(3), torch.tensor([0.5, 0.5, 0])
    loss, metrics = dpo_loss(*values, weights)
    expected, same = dpo_loss(*values[:, :2], weights[:2])
    assert loss.item() == pytest.approx(expected.item())
    assert {k: v.tolist() for k, v in metrics.items()} == {k: v.tolist() for k, v in same.items()}


def test_sums_leave_out_what_is_masked():
    log_probs = torch.tensor([[-1.0, -2.0, torch.nan], [-torch.inf, -0.5, -0.25]])
    mask = torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    assert sequence_log_probs(log_probs, mask).tolist() == [-3, -0.75]
