"""What tokens weigh."""

import pytest
import torch

from grpo_mcore.config.objective import LOSS_TYPES
from grpo_mcore.errors import ConfigError
from grpo_mcore.objectives.weights import equal_weights, mask_truncated, token_weights

MASK = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    "loss_type, row_sums",
    [
        ("grpo", [1 / 4, 1 / 4, 0, 1 / 4]),
        ("sapo", [1 / 4, 1 / 4, 0, 1 / 4]),
        ("dapo", [3 / 7, 1 / 7, 0, 3 / 7]),
        ("cispo", [3 / 7, 1 / 7, 0, 3 / 7]),
        ("vespo", [3 / 7, 1 / 7, 0, 3 / 7]),
        ("bnpo", [3 / 7, 1 / 7, 0, 3 / 7]),
        ("dr_grpo", [3 / 40, 1 / 40, 0, 3 / 40]),
        ("luspo", [3 / 4, 1 / 4, 0, 3 / 4]),
    ],
)
def test_sums_of_sequences(loss_type, row_sums):
    found = token_weights(MASK, loss_type, 10)
    assert found.sum(1).tolist() == pytest.approx(row_sums)
    assert torch.equal(found > 0, MASK > 0)
    assert (found == found.amax(1, keepdim=True)).equal((MASK > 0) | (MASK.sum(1) == 0)[:, None])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_only_some_types_take_the_mean_over_updates(loss_type):
    plain, given = (
        token_weights(MASK, loss_type, 10, tokens)
        for tokens in (None, torch.full((len(MASK),), 14.0))
    )
    half = loss_type in ("dapo", "cispo", "vespo")
    torch.testing.assert_close(given, plain / 2 if half else plain)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_tokens_weigh_nothing(loss_type):
    assert token_weights(torch.zeros(2, 3), loss_type, 10).count_nonzero() == 0


def test_equal_weights():
    assert equal_weights(MASK)[MASK > 0].tolist() == pytest.approx([1 / 7] * 7)
    assert equal_weights(MASK, 14)[MASK > 0].tolist() == pytest.approx([1 / 14] * 7)


def test_sequences_cut_off_leave_the_mask():
    finished = torch.tensor([True, False, True, False])
    assert mask_truncated(MASK, finished).sum(1).tolist() == [3, 0, 0, 0]


def test_unknown_type_is_refused():
    with pytest.raises(ConfigError, match="loss_type=ppo: choose one of grpo, bnpo, "):
        token_weights(MASK, "ppo", 10)
