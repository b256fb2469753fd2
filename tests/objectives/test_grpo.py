"""What has to hold of the loss whatever the loss type, and each option by hand."""

import pytest
import torch

from grpo_mcore.config.objective import LOSS_TYPES
from grpo_mcore.errors import ConfigError
from grpo_mcore.objectives.entropy import high_entropy_mask
from grpo_mcore.objectives.kl import kl_estimate
from grpo_mcore.objectives.weights import token_weights
from tests.objectives.batches import (
    ADVANTAGES,
    ENTROPIES,
    LENGTH,
    LOG_PROBS,
    MASK,
    OLD,
    REFERENCE,
    SAMPLING,
    configured,
    evaluate,
)

COLUMNS = {
    "old_log_probs": OLD,
    "ref_log_probs": REFERENCE,
    "sampling_log_probs": SAMPLING,
    "importance_sampling_ratio": (OLD - SAMPLING).exp(),
    "entropy_mask": high_entropy_mask(ENTROPIES, MASK, 0.5),
}
every_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES)
every_level = pytest.mark.parametrize("level", ["token", "sequence"])


def everything(loss_type: str, level: str = "token", **settings):
    """Settings with every option in use."""
    given = {"importance_sampling_level": level, "beta": 0.04, "delta": 1.5}
    return configured(loss_type, off_policy_mask_threshold=0.05, **given | settings)


@every_loss_type
@every_level
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("corrected", [True, False])
def test_splitting_the_batch_changes_nothing(loss_type, level, estimator, corrected):
    settings = {"kl_estimator": estimator, "use_bias_correction_kl": corrected}
    config = everything(loss_type, level, **settings)
    whole = evaluate(config, **COLUMNS)
    for sizes in ([1, 1, 1, 1], [2, 0, 2], [3, 1], [1, 3]):
        rows = torch.tensor([2, 0, 3, 1]).split(sizes)
        parts = evaluate(config, rows=rows, **COLUMNS)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


@every_loss_type
@every_level
@pytest.mark.parametrize(
    "spoilt", ["log_probs", "old_log_probs", "ref_log_probs", "sampling_log_probs"]
)
def test_what_is_masked_counts_for_nothing_even_if_not_finite(loss_type, level, spoilt):
    columns = {"log_probs": LOG_PROBS} | COLUMNS
    config = everything(loss_type, level)
    expected = evaluate(config, **columns)
    for value in (torch.nan, -torch.inf):
        columns[spoilt] = columns[spoilt].where(MASK > 0, value)
        torch.testing.assert_close(evaluate(config, **columns), expected, rtol=0, atol=0)


@every_loss_type
@every_level
def test_fully_masked_row_is_harmless(loss_type, level):
    mask = MASK.clone()
    mask[1] = 0
    loss, gradient, metrics = evaluate(everything(loss_type, level), mask=mask, **COLUMNS)
    assert loss.isfinite() and gradient.isfinite().all()
    assert all(value == value for value in metrics.values())
    assert gradient[1].count_nonzero() == 0 and gradient[3].count_nonzero() > 0


@every_loss_type
def test_batch_without_any_token_costs_nothing(loss_type):
    loss, gradient, metrics = evaluate(
        everything(loss_type), mask=torch.zeros_like(MASK), **COLUMNS
    )
    assert loss == 0 and gradient.count_nonzero() == 0
    assert all(value == 0 for value in metrics.values())


@every_loss_type
def test_advantages_of_0_teach_nothing(loss_type):
    columns = {"old_log_probs": OLD, "advantages": torch.zeros_like(ADVANTAGES)}
    loss, gradient, _ = evaluate(configured(loss_type), **columns)
    assert loss == 0 and gradient.count_nonzero() == 0


@every_loss_type
def test_advantages_may_differ_from_token_to_token(loss_type):
    config = everything(loss_type)
    expanded = ADVANTAGES[:, None].expand(4, LENGTH)
    torch.testing.assert_close(
        evaluate(config, advantages=expanded, **COLUMNS)[:2], evaluate(config, **COLUMNS)[:2]
    )
    changed = expanded.clone()
    changed[1, 3] = 0.9
    _, gradient, _ = evaluate(configured(loss_type), advantages=changed, old_log_probs=OLD)
    _, before, _ = evaluate(configured(loss_type), advantages=expanded, old_log_probs=OLD)
    assert (gradient != before).nonzero().tolist() == [[1, 3]]


@every_loss_type
def test_on_policy_all_loss_types_but_for_their_weights_are_the_policy_gradient(loss_type):
    """With the ratio 1 the gradient is that of -advantage * log p, weighted."""
    _, gradient, _ = evaluate(configured(loss_type))
    expected = -ADVANTAGES[:, None] * token_weights(MASK, loss_type, LENGTH)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_reference_equal_to_the_policy_adds_nothing():
    for settings in ({"use_bias_correction_kl": False}, {"use_bias_correction_kl": True}):
        config = configured("dapo", beta=0.04, **settings)
        with_kl = evaluate(config, ref_log_probs=LOG_PROBS)
        assert with_kl[2]["kl"] == 0
        torch.testing.assert_close(with_kl[:2], evaluate(configured("dapo"))[:2], rtol=0, atol=0)


@pytest.mark.seed(14)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@every_level
def test_kl_term_is_the_weighted_mean_of_the_estimator(estimator, level):
    settings = {"beta": 0.3, "kl_estimator": estimator, "importance_sampling_level": level}
    columns = {"old_log_probs": OLD, "ref_log_probs": REFERENCE}
    columns |= {"advantages": torch.zeros_like(ADVANTAGES)}
    kl = kl_estimate(LOG_PROBS, REFERENCE, estimator)
    weights = token_weights(MASK, "grpo", LENGTH)
    plain = configured("grpo", use_bias_correction_kl=False, **settings)
    loss, _, metrics = evaluate(plain, **columns)
    assert loss.item() == pytest.approx(0.3 * (kl * weights).sum().item())
    assert metrics["kl"] == pytest.approx((kl * MASK).sum().item() / 18)

    gap = LOG_PROBS - OLD
    if level == "sequence":
        gap = (gap * MASK).sum(1, keepdim=True) / MASK.sum(1, keepdim=True)
    loss, _, metrics = evaluate(configured("grpo", **settings), **columns)
    assert loss.item() == pytest.approx(0.3 * (kl * gap.exp() * weights).sum().item())
    assert metrics["kl"] == pytest.approx((kl * gap.exp() * MASK).sum().item() / 18)


def test_kl_in_the_reward_stays_out_of_the_loss():
    config = configured("dapo", beta=0.04, use_kl_in_reward=True)
    found = evaluate(config, old_log_probs=OLD)
    torch.testing.assert_close(found, evaluate(configured("dapo"), old_log_probs=OLD))


def test_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta=0\.04: the KL term needs ref_log_probs"):
        evaluate(configured("dapo", beta=0.04))


def test_masks_and_correction_leave_the_kl_alone():
    """Their part of the gradient is that of the policy term."""
    columns = {"old_log_probs": OLD, "entropy_mask": torch.zeros_like(MASK)}
    _, gradient, _ = evaluate(configured("dapo"), **columns)
    assert gradient.count_nonzero() == 0
    _, gradient, _ = evaluate(configured("dapo", beta=0.04), ref_log_probs=REFERENCE, **columns)
    columns["advantages"] = torch.zeros_like(ADVANTAGES)
    _, expected, _ = evaluate(configured("dapo", beta=0.04), ref_log_probs=REFERENCE, **columns)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)
    assert gradient.count_nonzero() == 18


def test_off_policy_mask_takes_the_old_policy_where_there_is_no_engine():
    config = configured("dapo", off_policy_mask_threshold=0.05)
    found = evaluate(config, old_log_probs=OLD)
    assert found[1].count_nonzero() > 0
    torch.testing.assert_close(
        found, evaluate(config, old_log_probs=OLD, sampling_log_probs=OLD), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "advantages, low, high, low_min, high_max",
    [([1, -1, 1], 2, 1, 0, 1 / 3), ([-1, -1, -1], 3, 0, 1 / 3, 0), ([1, 1, 1], 0, 2, 0, 1 / 3)],
)
def test_clip_metrics_by_hand(advantages, low, high, low_min, high_max):
    """The last sequence has no tokens, and no part in the extremes either."""
    log_probs = torch.log(torch.tensor([[1.5, 0.5, 1.0], [0.5, 0.5, 1.5], [1.0, 1.0, 1.0]]))
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 1], [0, 0, 0]])
    columns = {"advantages": torch.tensor(advantages), "old_log_probs": torch.zeros_like(mask)}
    found = evaluate(configured("dapo"), log_probs.double(), mask=mask, **columns)[2]
    del found["loss"]
    assert found == pytest.approx(
        {
            "clip_ratio/low_mean": low / 6,
            "clip_ratio/high_mean": high / 6,
            "clip_ratio/region_mean": (low + high) / 6,
            "clip_ratio/low_min": low_min,
            "clip_ratio/high_max": high_max,
        }
    )


def test_cap_bounds_what_a_bad_sample_costs():
    """Where the advantage is negative the ratio is not clipped from above, but for delta."""
    settings = {"advantages": -torch.ones(4, dtype=torch.float64), "old_log_probs": LOG_PROBS - 2}
    loss, gradient, _ = evaluate(configured("dapo"), **settings)
    assert loss.item() == pytest.approx(torch.tensor(2.0).exp().item())
    loss, gradient, metrics = evaluate(configured("dapo", delta=3.0), **settings)
    assert loss.item() == pytest.approx(3) and gradient.count_nonzero() == 0
    assert metrics["clip_ratio/region_mean"] == 0


def test_vespo_never_overflows():
    found = evaluate(configured("vespo"), old_log_probs=LOG_PROBS - 1000)
    assert found[0] == 0 and found[1].count_nonzero() == 0
    found = evaluate(configured("vespo"), importance_sampling_ratio=torch.zeros_like(MASK))
    assert found[0].isfinite() and found[1].isfinite().all()


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"loss_type": "ppo"}, "loss_type=ppo: choose one of grpo, bnpo, dr_grpo, dapo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level=word: choose one of t"),
        ({"kl_estimator": "k4", "beta": 1.0}, "kl_estimator=k4: choose one of k1, k2, k3"),
    ],
)
def test_unknown_choices_are_refused(setting, message):
    config = configured(**{"loss_type": "dapo"} | setting)
    weights = token_weights(MASK, "dapo", LENGTH)
    with pytest.raises(ConfigError, match=message):
        evaluate(config, weights=weights, ref_log_probs=REFERENCE)
