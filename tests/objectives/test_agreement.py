"""What is reported of trainer and engine disagreeing."""

import math

import pytest
import torch

from grpo_mcore.errors import MismatchError
from grpo_mcore.objectives.agreement import agreement
from grpo_mcore.objectives.metrics import combine
from grpo_mcore.steps.verdict import MismatchLimits


def measure(*columns, rows=None):
    """The whole's metrics, from one part or from parts of `rows` sequences each."""
    count = len(columns[0])
    parts = zip(*(c.split(rows or max(count, 1)) for c in columns), strict=True)
    return combine([{n: v.tolist() for n, v in agreement(*part).items()} for part in parts])


def test_equal_log_probs_agree_perfectly():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    found = measure(log_probs, log_probs.clone(), torch.tensor([[1.0, 1.0, 0.0]]))
    perfect = {"mismatch": 1.0, "rollout_kl": 0.0, "max": 0.0, "ratio": 1.0, "ess": 1.0}
    assert found == perfect | {f"at_0-15/{name}": value for name, value in perfect.items()}


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
    ratios = [math.exp(0.1), math.exp(-0.2), 1.0]
    assert found["ratio"] == pytest.approx(sum(ratios) / 3, rel=1e-6)
    size = sum(ratios) ** 2 / sum(r * r for r in ratios)
    assert found["ess"] == pytest.approx(size / 3, rel=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(0, 3), torch.zeros(2, 3)])
def test_no_tokens_have_no_metrics(mask):
    assert measure(mask, mask, mask) == {}


@pytest.fixture
def batch():
    """Completions of up to 90 tokens behind prompts of up to 9, with a tool's answer in the second:
    log-probabilities of trainer and engine, mask."""
    generator = torch.Generator().manual_seed(3)
    trainer = -2 * torch.rand(6, 100, generator=generator)
    engine = trainer + 0.1 * torch.randn(6, 100, generator=generator)
    mask = torch.zeros(6, 100)
    for row, (prompt, length) in enumerate([(9, 90), (2, 70), (5, 64), (1, 16), (7, 3), (4, 0)]):
        mask[row, prompt : prompt + length] = 1
    mask[1, 10:20] = 0
    engine[0, 50] = math.nan
    return trainer, engine, mask


def test_positions_count_from_the_first_token_of_the_completion(batch):
    trainer, engine, mask = batch
    found = measure(*batch)
    gaps = {"0-15": [], "16-63": [], "64-255": []}
    for row, first in enumerate([9, 2, 5, 1, 7]):
        for column in range(100):
            if mask[row, column] and not engine[row, column].isnan():
                at = column - first
                name = "0-15" if at < 16 else "16-63" if at < 64 else "64-255"
                gaps[name].append((trainer - engine)[row, column].double())
    assert [len(g) for g in gaps.values()] == [16 * 4 + 3 - 8, 48 * 3 - 2 - 1, 26 + 6]
    for name, values in gaps.items():
        gap = torch.stack(values)
        ratio = gap.exp()
        expected = {
            "mismatch": gap.abs().exp().mean(),
            "rollout_kl": (ratio - 1 - gap).mean(),
            "max": gap.abs().max(),
            "ratio": ratio.mean(),
            "ess": ratio.sum() ** 2 / (len(gap) * (ratio**2).sum()),
        }
        for key, value in expected.items():
            assert found[f"at_{name}/{key}"] == pytest.approx(value.item(), rel=1e-12), key
    assert not any("at_256" in name for name in found)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_whole_does_not_depend_on_how_it_was_split(batch, rows):
    assert measure(*batch, rows=rows) == pytest.approx(measure(*batch), rel=1e-12)


@pytest.mark.parametrize("gap", [-1000.0, -400.0, 400.0, 1000.0, math.inf, math.nan])
def test_a_gross_mismatch_stops_the_run(gap):
    found = measure(torch.full((1, 3), gap), torch.zeros(1, 3), torch.ones(1, 3))
    with pytest.raises(MismatchError, match=r"sampling/mismatch is \S{3,11}, above"):
        MismatchLimits(1.1, 1.5).judge(7, found["mismatch"])
