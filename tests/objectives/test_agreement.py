"""What is reported of trainer and engine disagreeing."""

import math

import pytest
import torch

from grpo_mcore.objectives.agreement import agreement_sums


def test_equal_log_probs_agree_perfectly():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    sums = agreement_sums(log_probs, log_probs.clone(), torch.tensor([[1.0, 1.0, 0.0]]))
    assert {name: value.item() for name, value in sums.items()} == {
        "mismatch": 2.0,  # the tokens: exp(0) each
        "rollout_kl": 0.0,
        "max": 0.0,
    }


def test_sums_by_hand_without_what_is_masked():
    trainer = torch.tensor([[-1.0, -2.0], [-0.5, math.nan]])
    engine = torch.tensor([[-1.1, -1.8], [-0.5, 0.0]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    sums = agreement_sums(trainer, engine, mask)
    assert sums["mismatch"].item() == pytest.approx(math.exp(0.1) + math.exp(0.2) + 1, rel=1e-6)
    kl = (math.exp(0.1) - 0.1 - 1) + (math.exp(-0.2) + 0.2 - 1)
    assert sums["rollout_kl"].item() == pytest.approx(kl, rel=1e-5)
    assert sums["max"].item() == pytest.approx(0.2, rel=1e-6)


def test_no_tokens_at_all():
    sums = agreement_sums(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert all(value == 0 for value in sums.values())
