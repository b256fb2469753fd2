"""Loss, gradient and advantages against values computed once with TRL 1.16, in float64."""

import math

import pytest
import torch

from grpo_mcore.objectives.advantages import compute_advantages
from grpo_mcore.objectives.correction import rollout_correction
from grpo_mcore.objectives.entropy import entropy_bonus, high_entropy_mask
from grpo_mcore.objectives.weights import equal_weights, token_weights
from tests.objectives.batches import (
    ENTROPIES,
    LENGTH,
    LOG_PROBS,
    MASK,
    OLD,
    REFERENCE,
    ROW,
    SAMPLING,
    configured,
    evaluate,
)

OFF = {"old_log_probs": OLD}
KL = {"ref_log_probs": REFERENCE}

# case -> settings, tensors, (loss, L1 norm of its gradient, gradient at [1, 3]), metrics
GOLDEN = {
    "grpo": (
        configured("grpo"), OFF,
        (-0.004318479507, 0.549992383872, 0.026391091359),
        {"clip_ratio/region_mean": 0.11111111},
    ),
    "bnpo": (
        configured("bnpo"), OFF,
        (0.152977774742, 0.627920764411, 0.035188121813),
        {"clip_ratio/region_mean": 0.11111111},
    ),
    "dapo": (
        configured("dapo"), OFF,
        (0.152977774742, 0.627920764411, 0.035188121813),
        {"clip_ratio/region_mean": 0.11111111},
    ),
    "dr_grpo": (
        configured("dr_grpo"), OFF,
        (0.114733331056, 0.470940573308, 0.026391091359),
        {},
    ),
    "cispo": (
        configured("cispo", epsilon_high=5.0), OFF,
        (-0.218239515824, 0.716133185834, 0.035188121813),
        {"cispo_clip_ratio": 0},
    ),
    "sapo": (
        configured("sapo"), OFF,
        (-0.037123752580, 0.653036441582, 0.026325327681),
        {},
    ),
    "vespo": (
        configured("vespo"), OFF,
        (-0.214891353813, 0.687756357422, 0.038888888889),
        {"vespo/phi_seq_mean": 0.91598477},
    ),
    "luspo, sequence": (
        configured("luspo", importance_sampling_level="sequence"), OFF,
        (0.679865762536, 3.190382854343, 0.175000000000),
        {},
    ),
    "grpo, sequence (GSPO)": (
        configured("grpo", importance_sampling_level="sequence"), OFF,
        (-0.005108554879, 0.650149991025, 0.029166666667),
        {},
    ),
    "grpo, on-policy, bias-corrected KL": (
        configured("grpo", beta=0.04), KL,
        (0.000160175016, 0.648400000000, 0.028966666667),
        {"kl": 0.00405063},
    ),
    "grpo, on-policy, plain KL (ATLAS)": (
        configured("grpo", beta=0.04, use_bias_correction_kl=False), KL,
        (0.000160175016, 0.648394449202, 0.028954171914),
        {"kl": 0.00405063},
    ),
    "dapo, bias-corrected KL": (
        configured("dapo", beta=0.04), OFF | KL,
        (0.153132573995, 0.626538372145, 0.034946831834),
        {"kl": 0.00386998},
    ),
    "dapo, plain KL": (
        configured("dapo", beta=0.04, use_bias_correction_kl=False), OFF | KL,
        (0.153139800024, 0.626261821941, 0.034904795476),
        {"kl": 0.00405063},
    ),
    "dapo, epsilon_high": (
        configured("dapo", epsilon_high=0.28), OFF,
        (0.151432019986, 0.716133185834, 0.035188121813),
        {"clip_ratio/region_mean": 0},
    ),
    # TRL's clip metrics see the ratio after the cap and miss the clips above.
    "grpo, delta": (
        configured("grpo", delta=1.15), OFF,
        (-0.001102795574, 0.483833067805, 0.026391091359),
        {"clip_ratio/region_mean": 0.11111111},
    ),
    "dapo, correction of rollouts by token": (
        configured("dapo"),
        OFF | {
            "importance_sampling_ratio": rollout_correction(
                OLD, SAMPLING, MASK, "token_truncate", None, 3.0
            )
        },
        (0.151412694658, 0.635505695081, 0.035898969026),
        {},
    ),
    "dapo, top entropy": (
        configured("dapo"), OFF | {"entropy_mask": high_entropy_mask(ENTROPIES, MASK, 0.2)},
        (0.102714201826, 0.102714201826, 0.0),
        {},
    ),
    "dapo, off-policy mask": (
        configured("dapo", off_policy_mask_threshold=0.05),
        OFF | {"sampling_log_probs": LOG_PROBS + 0.1 * (ROW % 2)},
        (-0.280804828168, 0.194138161502, 0.0),
        {"clip_ratio/region_mean": 0.11111111},
    ),
}  # fmt: skip


def check(found, expected, metrics):
    loss, gradient, found_metrics = found
    values = loss.item(), gradient.abs().sum().item(), gradient[1, 3].item()
    assert values == pytest.approx(expected, abs=1e-9)
    for name, value in metrics.items():
        assert found_metrics[name] == pytest.approx(value, abs=1e-8), name


@pytest.mark.seed(1, 14, 39)
@pytest.mark.parametrize("case", GOLDEN)
def test_loss_and_gradient_are_trls(case):
    config, columns, expected, metrics = GOLDEN[case]
    check(evaluate(config, **columns), expected, metrics)


def test_a_quarter_of_the_update():
    """TRL's gradient accumulation over 4: the other micro-batches have 12 more sequences."""
    weights = token_weights(torch.cat([MASK, torch.ones(12, LENGTH)]), "grpo", LENGTH)[:4]
    found = evaluate(configured("grpo"), weights=weights, **OFF)
    check(found, (-0.001079619877, 0.137498095968, 0.006597772840), {})


def test_part_of_an_update_of_several_batches():
    """TRL's gradient accumulation over 4 with steps_per_generation 2, and 173 tokens in each
    batch of samples: 346 in the update."""
    weights = token_weights(MASK, "dapo", LENGTH, torch.full((len(MASK),), 346.0))
    found = evaluate(configured("dapo"), weights=weights, **OFF)
    check(found, (0.007958381345, 0.032666398149, 0.001830595932), {})


def test_entropy_bonus_lowers_the_loss():
    loss, gradient, metrics = evaluate(configured("dapo"), **OFF)
    loss = loss - entropy_bonus(ENTROPIES, equal_weights(MASK), 0.01)
    check((loss, gradient, metrics), (0.145144441408, 0.627920764411, 0.035188121813), {})


REWARDS = torch.tensor(
    [
        [1.0, 0.2], [0.0, 0.5], [1.0, math.nan], [0.0, 0.1],
        [1.0, 1.0], [1.0, 0.0], [1.0, 0.3], [math.nan, math.nan],
    ],
    dtype=torch.float64,
)  # fmt: skip
GOLDEN_ADVANTAGES = {
    "group": (
        {"scale_rewards": "group"},
        [1.006532, -0.402613, 0.603919, -1.207838, 1.104053, -0.844276, -0.259777, 0],
    ),
    "batch": (
        {"scale_rewards": "batch"},
        [0.827739, -0.331096, 0.496643, -0.993287, 0.938104, -0.717374, -0.220731, 0],
    ),
    "none": (
        {"scale_rewards": "none"},
        [0.5, -0.2, 0.3, -0.6, 0.566667, -0.433333, -0.133333, 0],
    ),
    "normalize_then_sum": (
        {"multi_objective_aggregation": "normalize_then_sum"},
        [0.550903, 0.256875, 0.874014, -1.681793, 1.114431, -0.852212, -0.262219, 0],
    ),
    "weights": (
        {"reward_weights": [1.0, 0.5]},
        [0.947557, -0.663289, 0.758045, -1.042312, 1.103838, -0.844112, -0.259727, 0],
    ),
}


@pytest.mark.seed(13)
@pytest.mark.parametrize("case", GOLDEN_ADVANTAGES)
def test_advantages_are_trls(case):
    settings, expected = GOLDEN_ADVANTAGES[case]
    found = compute_advantages(REWARDS, 4, **settings)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
