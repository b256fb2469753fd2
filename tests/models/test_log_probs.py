"""Log-probabilities over a sharded vocabulary, their gradient and the entropy."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from grpo_mcore.models.log_probs import log_probs_and_entropy
from tests.end_to_end.conftest import run_script

pytestmark = pytest.mark.cores(4)

ROOT = Path(__file__).resolve().parents[2]
SHAPE, VOCAB = (3, 5), 17


@pytest.fixture(scope="module")
def alone():
    """The group of a world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(dtype=torch.float64, width=VOCAB):
    generator = torch.Generator().manual_seed(1)
    logits = 6 * torch.randn(*SHAPE, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, SHAPE, generator=generator)
    return logits.to(dtype).requires_grad_(), targets


def reference(logits, targets, temperature):
    """The same by torch alone: (log-probabilities, entropy)."""
    table = torch.log_softmax(logits / temperature, dim=-1)
    return table.gather(-1, targets[..., None]).squeeze(-1), -(table.exp() * table).sum(-1)


def gradient(log_probs, logits):
    weights = torch.linspace(-1, 2, log_probs.numel(), dtype=log_probs.dtype).view(log_probs.shape)
    return torch.autograd.grad((log_probs * weights).sum(), logits)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("chunk", [2048, 4, 1])
def test_values_and_gradient_are_those_of_log_softmax(alone, temperature, chunk):
    logits, targets = draw()
    found, entropy = log_probs_and_entropy(logits, targets, VOCAB, temperature, alone, chunk)
    expected, expected_entropy = reference(logits, targets, temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradient(found, logits), gradient(expected, logits), rtol=0, atol=1e-12
    )


def test_padding_has_probability_zero_and_no_gradient(alone):
    logits, targets = draw(width=VOCAB + 3)
    with torch.no_grad():
        logits[..., VOCAB:] = 1000.0
    found, entropy = log_probs_and_entropy(logits, targets, VOCAB, 1.0, alone)
    expected, expected_entropy = reference(logits[..., :VOCAB], targets, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-12)
    assert gradient(found, logits)[..., VOCAB:].count_nonzero() == 0


def test_huge_logits_neither_overflow_nor_lose_precision(alone):
    logits = torch.tensor([[1e4, 1e4, -1e4]], requires_grad=True)
    found, _ = log_probs_and_entropy(logits, torch.tensor([0]), 3, 1.0, alone)
    assert found.item() == pytest.approx(-0.693147, abs=1e-6)
    assert gradient(found, logits).isfinite().all()


def test_low_precision_is_computed_in_float32(alone):
    logits, targets = draw(torch.bfloat16)
    found, entropy = log_probs_and_entropy(logits, targets, VOCAB, 1.0, alone)
    assert found.dtype == entropy.dtype == torch.float32
    expected, _ = reference(logits.float(), targets, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert gradient(found, logits).dtype == torch.bfloat16


def test_entropy_carries_its_gradient(alone):
    logits = (3 * torch.randn(5, VOCAB)).double().requires_grad_()
    targets = torch.zeros(5, dtype=torch.long)
    _, entropy = log_probs_and_entropy(logits, targets, VOCAB, 0.7, alone, chunk=2)
    (found,) = torch.autograd.grad(entropy.square().sum(), logits)
    _, expected_entropy = reference(logits, targets, 0.7)
    (expected,) = torch.autograd.grad(expected_entropy.square().sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_values_are_trls(alone):
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits, targets = draw(torch.float32)
    found, entropy = log_probs_and_entropy(logits, targets, VOCAB, 0.8, alone)
    scaled = logits.detach() / 0.8
    torch.testing.assert_close(found, selective_log_softmax(scaled, targets), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, entropy_from_logits(scaled), rtol=0, atol=1e-5)


def test_sharding_over_two_and_four_ranks_changes_nothing():
    worker = Path(__file__).with_name("log_probs_worker.py")
    assert run_script(worker, ranks=4).count("agreed") == 4
