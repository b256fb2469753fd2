"""Tokens of high entropy, the bonus and its coefficient."""

import pytest
import torch

from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.objectives.entropy import EntropyController, entropy_bonus, high_entropy_mask
from grpo_mcore.objectives.weights import equal_weights


def test_highest_tokens_are_kept():
    entropies = torch.tensor([[0.1, 0.9, 0.5, 9.0], [0.7, 0.3, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])

    def kept(quantile):
        return sorted(entropies[high_entropy_mask(entropies, mask, quantile)].tolist())

    assert kept(1.0) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert kept(0.75) == pytest.approx([0.3, 0.5, 0.7, 0.9])
    assert kept(0.5) == pytest.approx([0.5, 0.7, 0.9])
    assert kept(0.4) == pytest.approx([0.7, 0.9])
    assert kept(0.0) == pytest.approx([0.9])


def test_share_is_met_in_spite_of_rounding():
    """(1 - 0.7) * 10 is a little above 3."""
    assert high_entropy_mask(torch.rand(1, 11), torch.ones(1, 11), 0.7).sum() == 8


def test_equals_are_kept_together():
    entropies = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
    assert high_entropy_mask(entropies, torch.ones(1, 4), 0.0).tolist() == [[True] * 3 + [False]]


def test_nothing_to_keep():
    assert not high_entropy_mask(torch.ones(2, 3), torch.zeros(2, 3), 0.5).any()


def test_more_tokens_than_torch_finds_quantiles_of():
    entropies = torch.arange(2.0**24 + 1)[None]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(entropies, 0.5)
    kept = high_entropy_mask(entropies, torch.ones_like(entropies), 0.5)
    assert kept.sum() == 2**23 + 1


def test_bonus_is_the_same_however_the_batch_is_split():
    entropies = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(6, 5) < 0.7
    weights = equal_weights(mask)
    whole = entropy_bonus(entropies, weights, 0.3)
    assert whole.item() == pytest.approx(0.3 * entropies[mask].mean().item())
    parts = sum(
        entropy_bonus(entropies[rows], weights[rows], 0.3) for rows in torch.arange(6).split(4)
    )
    assert parts.item() == pytest.approx(whole.item(), abs=1e-15)
    (gradient,) = torch.autograd.grad(parts, entropies)
    torch.testing.assert_close(gradient, 0.3 * weights)


def test_masked_entropy_may_be_anything():
    entropies = torch.tensor([[1.0, torch.nan]], requires_grad=True)
    bonus = entropy_bonus(entropies, torch.tensor([[1.0, 0.0]]), 0.5)
    assert bonus == 0.5
    assert torch.autograd.grad(bonus, entropies)[0].tolist() == [[0.5, 0.0]]


def test_fixed_coefficient_stays():
    controller = EntropyController(ObjectiveConfig(entropy_coef=0.01))
    controller.update(0.0)
    assert controller.applied == 0.01


def test_adaptive_coefficient_follows_the_target_within_its_bounds():
    config = ObjectiveConfig(
        entropy_coef=0.01,
        use_adaptive_entropy=True,
        entropy_target=1.0,
        entropy_coef_delta=0.01,
        entropy_coef_max=0.025,
        entropy_coef_min=0.002,
    )
    controller = EntropyController(config)
    assert controller.applied == 0  # nothing is known yet
    applied, coefs = [], []
    for entropy in (0.5, 1.0, 0.9, 1.1, 1.1, 1.1, 0.2):
        controller.update(entropy)
        applied.append(controller.applied)
        coefs.append(controller.coef)
    assert coefs == pytest.approx([0.02, 0.025, 0.025, 0.015, 0.005, 0.002, 0.012])
    assert applied == pytest.approx([0.02, 0.025, 0.025, 0, 0, 0, 0.012])
