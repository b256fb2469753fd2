"""What is reported of trainer and engine disagreeing."""

import math

import pytest
import torch

from grpo_mcore.objectives.agreement import agreement
from grpo_mcore.objectives.metrics import combine


def measure(*columns):
    return combine([{name: value.tolist() for name, value in agreement(*columns).items()}])


def test_equal_log_probs_agree_perfectly():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    found = measure(log_probs, log_probs.clone(), torch.tensor([[1.0, 1.0, 0.0]]))
    assert found == {"mismatch": 1.0, "rollout_kl": 0.0, "max": 0.0}


def test_means_by_hand_without_what_is_masked_or_unknown():
    trainer = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, math.nan, -1.0]])
    engine = torch.tensor([[-1.1, -1.8, math.nan], [-0.5, 0.0, 7.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    found = measure(trainer, engine, mask)
    mismatch = (math.exp(0.1) + math.exp(0.2) + 1) / 3
    assert found["mismatch"] == pytest.approx(mismatch, rel=1e-6)
    kl = (math.exp(0.1) - 0.1 - 1) + (math.exp(-0.2) + 0.2 - 1)
    assert found["rollout_kl"] == pytest.approx(kl / 3, rel=1e-5)
    assert found["max"] == pytest.approx(0.2, rel=1e-6)


def test_no_tokens_at_all():
    found = measure(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert all(value == 0 for value in found.values())
