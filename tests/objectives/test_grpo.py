"""The loss against values computed once with TRL 1.16 on the same tensors, in float64."""

import pytest
import torch

from grpo_mcore.objectives.grpo import GRPOLossConfig, grpo_loss, k3, token_weights

LENGTH = 6
ROW, COLUMN = torch.meshgrid(torch.arange(4.0), torch.arange(LENGTH * 1.0), indexing="ij")
ROW, COLUMN = ROW.double(), COLUMN.double()
LOG_PROBS = -0.5 - 0.3 * ((3 * ROW + 5 * COLUMN) % 7)
OLD = LOG_PROBS - 0.1 * ((2 * ROW + 3 * COLUMN) % 5 - 2)
REFERENCE = LOG_PROBS + 0.08 * ((ROW + 2 * COLUMN) % 4 - 1.5)
ADVANTAGES = torch.tensor([1.2, -0.7, 0.1, -0.6], dtype=torch.float64)
MASK = torch.ones(4, LENGTH)
MASK[0, 4:] = 0
MASK[2, 2:] = 0

# loss type, old, beta, epsilon_high -> loss, L1 norm of its gradient, gradient at [1, 3]
GOLDEN = {
    "grpo": (("grpo", OLD, 0.0, None), (-0.004318479507, 0.549992383872, 0.026391091359)),
    "dapo": (("dapo", OLD, 0.0, None), (0.152977774742, 0.627920764411, 0.035188121813)),
    "dr_grpo": (("dr_grpo", OLD, 0.0, None), (0.114733331056, 0.470940573308, 0.026391091359)),
    "grpo, on-policy, KL": (
        ("grpo", None, 0.04, None),
        (0.000160175016, 0.648394449202, 0.028954171914),
    ),
    "dapo, KL": (("dapo", OLD, 0.04, None), (0.153139800024, 0.626261821941, 0.034904795476)),
    "dapo, epsilon_high": (
        ("dapo", OLD, 0.0, 0.28),
        (0.151432019986, 0.716133185834, 0.035188121813),
    ),
}


def evaluate(
    loss_type="dapo", old=OLD, beta=0.0, epsilon_high=None, mask=MASK, reference=REFERENCE, parts=1
):
    """(loss, gradient, metrics) with the batch cut into `parts`."""
    log_probs = LOG_PROBS.clone().requires_grad_()
    weights = token_weights(mask, loss_type, LENGTH)
    config = GRPOLossConfig(beta, 0.2, epsilon_high)
    loss, metrics = 0.0, {}
    for rows in torch.arange(4).chunk(parts):
        share, sums = grpo_loss(
            log_probs[rows],
            None if old is None else old[rows],
            reference[rows],
            ADVANTAGES[rows],
            weights[rows],
            config,
        )
        loss = loss + share
        metrics = {name: metrics.get(name, 0.0) + value for name, value in sums.items()}
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.detach(), gradient, metrics


@pytest.mark.parametrize("case", GOLDEN)
def test_loss_and_gradient_are_trls(case):
    settings, (loss, l1, at_1_3) = GOLDEN[case]
    found, gradient, metrics = evaluate(*settings)
    assert found.item() == pytest.approx(loss, abs=1e-9)
    assert gradient.abs().sum().item() == pytest.approx(l1, abs=1e-9)
    assert gradient[1, 3].item() == pytest.approx(at_1_3, abs=1e-9)
    assert metrics["loss"] == found


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_metrics_are_trls_whatever_the_loss_type(loss_type):
    _, _, metrics = evaluate(loss_type, beta=0.04)
    tokens = MASK.sum().item()
    assert metrics["kl"].item() / tokens == pytest.approx(0.00405063, abs=1e-8)
    assert metrics["clip_ratio/region_mean"].item() / tokens == pytest.approx(0.11111111, abs=1e-8)


def test_nothing_is_clipped_within_the_wider_range():
    _, _, metrics = evaluate(epsilon_high=0.28)
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("parts", [2, 4])
def test_splitting_the_batch_changes_nothing(loss_type, parts):
    whole = evaluate(loss_type, beta=0.04)
    split = evaluate(loss_type, beta=0.04, parts=parts)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_what_is_masked_counts_for_nothing_even_if_not_finite(loss_type, monkeypatch):
    expected = evaluate(loss_type, beta=0.04)
    for tensor in (LOG_PROBS, OLD, REFERENCE):
        spoilt = tensor.where(MASK > 0, float("-inf"))
        monkeypatch.setattr(f"{__name__}.LOG_PROBS", spoilt if tensor is LOG_PROBS else LOG_PROBS)
        found = evaluate(
            loss_type,
            spoilt if tensor is OLD else OLD,
            0.04,
            reference=spoilt if tensor is REFERENCE else REFERENCE,
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        monkeypatch.undo()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_fully_masked_row_is_harmless(loss_type):
    mask = MASK.clone()
    mask[1] = 0
    loss, gradient, metrics = evaluate(loss_type, beta=0.04, mask=mask)
    assert loss.isfinite() and gradient.isfinite().all() and metrics["kl"].isfinite()
    assert gradient[1].count_nonzero() == 0 and gradient[3].count_nonzero() > 0


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_batch_without_any_token_costs_nothing(loss_type):
    loss, gradient, _ = evaluate(loss_type, beta=0.04, mask=torch.zeros_like(MASK))
    assert loss == 0 and gradient.count_nonzero() == 0


def test_reference_equal_to_the_policy_adds_nothing():
    with_kl = evaluate(beta=0.04, reference=LOG_PROBS)
    without = evaluate(beta=0.0)
    assert with_kl[2]["kl"] == 0
    torch.testing.assert_close(with_kl[:2], without[:2], rtol=0, atol=0)


def test_k3_is_never_negative_and_flat_at_equality():
    policy = LOG_PROBS.clone().requires_grad_()
    assert (k3(policy, REFERENCE) > 0).all()
    (gradient,) = torch.autograd.grad(k3(policy, LOG_PROBS).sum(), policy)
    assert gradient.count_nonzero() == 0


def test_weights_add_up_to_one_and_follow_the_type():
    assert token_weights(MASK, "grpo", LENGTH).sum(1) == pytest.approx([0.25] * 4)
    assert token_weights(MASK, "dapo", LENGTH)[MASK > 0] == pytest.approx([1 / 18] * 18)
    assert token_weights(MASK, "dr_grpo", 10)[MASK > 0] == pytest.approx([1 / 40] * 18)
    with pytest.raises(ValueError, match="loss_type=ppo: choose one of grpo, dapo, dr_grpo"):
        token_weights(MASK, "ppo", LENGTH)
