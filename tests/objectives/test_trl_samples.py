"""Advantages, corrections and truncation against TRL's `_generate_and_score_completions`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_mcore.config.objective import AGGREGATIONS, CORRECTION_MODES, SCALES
from grpo_mcore.objectives.advantages import (
    compute_advantages,
    groups_without_spread,
    sum_rewards,
)
from grpo_mcore.objectives.correction import correction_metrics, rollout_correction
from grpo_mcore.objectives.metrics import combine
from grpo_mcore.objectives.weights import mask_truncated
from tests.objectives.trl_oracle import EXAMPLES, QUIET, TOLERANCE, make_trainer, prepare

pytest.importorskip("trl")
pytestmark = QUIET

WORD = 7  # neither the end token nor padding


def draw_rewards(generator: torch.Generator, samples: int, functions: int) -> torch.Tensor:
    """Few values, so that whole groups agree, and some not given."""
    rewards = torch.randint(0, 3, (samples, functions), generator=generator).double() / 4
    missing = torch.rand(samples, functions, generator=generator) < 0.3
    return rewards.masked_fill(missing, torch.nan)


@pytest.mark.seed(39)
@settings(EXAMPLES, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    num_generations=st.integers(2, 5),
    groups=st.integers(1, 4),
    weights=st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=1, max_size=3),
    scale_rewards=st.sampled_from(SCALES),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_advantages(seed, num_generations, groups, weights, scale_rewards, aggregation):
    samples = num_generations * groups
    rewards = draw_rewards(torch.Generator().manual_seed(seed), samples, len(weights))
    trainer = make_trainer(
        functions=len(weights),
        num_generations=num_generations,
        reward_weights=weights,
        scale_rewards=scale_rewards,
        multi_objective_aggregation=aggregation,
    )
    expected = prepare(trainer, rewards, [[1]] * samples)["advantages"]
    found = compute_advantages(rewards, num_generations, scale_rewards, aggregation, weights)
    assert (found - expected).abs().max() <= TOLERANCE

    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    total = sum_rewards(rewards, weights)
    assert total.nanmean().item() == pytest.approx(metrics["reward"], nan_ok=True)
    enough = ((~total.isnan()).view(-1, num_generations).sum(1) > 1).all()
    if enough and aggregation == "sum_then_normalize" and scale_rewards != "batch":
        share = groups_without_spread(total, num_generations).double().mean().item()
        assert share == pytest.approx(metrics["frac_reward_zero_std"])


@settings(EXAMPLES, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([4, 8]),
    mode=st.sampled_from(CORRECTION_MODES),
    clip_max=st.sampled_from([None, 1.1, 3.0]),
    clip_min=st.sampled_from([None, 0.3, 0.9]),
    truncated=st.booleans(),
)
def test_correction_of_rollouts(seed, rows, mode, clip_max, clip_min, truncated):
    if mode.endswith("truncate") and clip_max is None and clip_min is None:
        clip_max = 3.0
    generator = torch.Generator().manual_seed(seed)
    trainer = make_trainer(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=clip_max,
        vllm_importance_sampling_clip_min=clip_min,
        mask_truncated_completions=truncated,
    )
    end = trainer._tokenizer.eos_token_id
    lengths = torch.randint(1, 8, (rows,), generator=generator).tolist()
    lengths[0] = 7
    finished = torch.rand(rows, generator=generator) < 0.7
    completions = [
        [WORD] * (length - 1) + [end if done else WORD]
        for length, done in zip(lengths, finished, strict=True)
    ]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).double()
    old = -torch.randn(rows, 7, generator=generator, dtype=torch.float64).exp()
    sampling = old + 0.2 * torch.randn(rows, 7, generator=generator)
    sampling[torch.rand(rows, 7, generator=generator) < 0.1] = torch.nan
    listed = [
        [None if value != value else value for value in row[:length].tolist()]
        for row, length in zip(sampling, lengths, strict=True)
    ]
    expected = prepare(trainer, torch.zeros(rows, 1), completions, old, listed)

    if truncated:
        mask = mask_truncated(mask, finished)
    assert torch.equal(mask, expected["completion_mask"].double())
    assert mask.sum() == expected["num_items_in_batch"]
    ratio = rollout_correction(old, sampling, mask, mode, clip_min, clip_max)
    assert (ratio - expected["importance_sampling_ratio"]).abs().max() <= TOLERANCE

    if mask.any(1).all():  # else we differ: docs/objectives.md
        parts = correction_metrics(ratio, old, sampling, mask)
        found = combine([{name: value.tolist() for name, value in parts.items()}])
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        for name, value in found.items():
            assert value == pytest.approx(metrics[f"sampling/{name}"], abs=1e-6), name
