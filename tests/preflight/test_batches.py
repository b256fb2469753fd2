"""Batch sizes that say one another, and those that contradict."""

from dataclasses import replace

import pytest

from grpo_mcore.config import ConfigError, GRPOConfig, SFTConfig
from grpo_mcore.preflight.batches import (
    generation_cycle,
    prompts_per_generation,
    steps_per_epoch,
    with_batches,
    with_steps,
)


def settled(data_ranks: int = 1, **settings) -> GRPOConfig:
    return with_batches(GRPOConfig(**settings), data_ranks)


@pytest.mark.parametrize(
    "settings, data_ranks, accumulation, prompts",
    [
        # Unsloth's example: 1 x 8 / 4
        (
            {
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "num_generations": 4,
            },
            1, 8, 2,
        ),
        # ATLAS's, which says no accumulation: the fewest micro-batches that make whole groups
        ({"per_device_train_batch_size": 4, "num_generations": 8}, 1, 2, 1),
        ({"per_device_train_batch_size": 4, "num_generations": 8}, 4, 1, 2),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, 1, 2, 3),
        # NeMo RL's: prompts of a step
        (
            {
                "per_device_train_batch_size": 4,
                "num_generations": 16,
                "num_prompts_per_step": 32,
            },
            2, 64, 32,
        ),
        (
            {
                "per_device_train_batch_size": 2,
                "num_generations": 4,
                "num_prompts_per_step": 3,
                "gradient_accumulation_steps": 6,
            },
            1, 6, 3,
        ),
    ],
)  # fmt: skip
@pytest.mark.seed(75)
def test_one_generation_a_step(settings, data_ranks, accumulation, prompts):
    config = settled(data_ranks, **settings)
    assert config.gradient_accumulation_steps == config.steps_per_generation == accumulation
    assert prompts_per_generation(config, data_ranks) == prompts


def test_a_generation_of_other_size_than_a_step():
    shape = {"per_device_train_batch_size": 2, "num_generations": 4}
    config = settled(2, **shape, gradient_accumulation_steps=2, generation_batch_size=24)
    assert (config.steps_per_generation, prompts_per_generation(config, 2)) == (6, 6)
    # As in TRL, one micro-batch a step where only the generation is given.
    config = settled(2, **shape, steps_per_generation=6)
    assert config.gradient_accumulation_steps == 1
    cycle = generation_cycle(replace(config, num_iterations=3))
    assert cycle.micro_steps == 18
    assert steps_per_epoch(replace(config, num_iterations=3), 2, rows=12) == 2 * 18


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"num_prompts_per_step": 3},
            r"^num_prompts_per_step=3 x num_generations=4: 12 sequences do not divide by 16 \(",
        ),
        (
            {"num_prompts_per_step": 8, "gradient_accumulation_steps": 4},
            r"^gradient_accumulation_steps=4: .* are 32 sequences, which .* make in 2",
        ),
        (
            {"generation_batch_size": 24},
            r"^generation_batch_size=24: does not divide by 16 \(per_device_train_batch_size=8 x 2",
        ),
        (
            {"generation_batch_size": 32, "steps_per_generation": 2},
            r"^generation_batch_size=32: steps_per_generation=2 says it already",
        ),
        (
            {"num_generations": 5, "steps_per_generation": 2},
            r"^num_generations=5: does not divide a generation's 32 completions",
        ),
    ],
)
def test_contradictions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        settled(2, **{"num_generations": 4} | settings)


def test_rows_of_a_step_without_groups():
    config = with_batches(SFTConfig(per_device_train_batch_size=2, batch_size=24), 3)
    assert config.gradient_accumulation_steps == 4
    config = with_batches(
        SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=5), 3
    )
    assert config.batch_size == 30
    with pytest.raises(ConfigError, match=r"^batch_size=7: 7 sequences do not divide by 6"):
        with_batches(SFTConfig(per_device_train_batch_size=2, batch_size=7), 3)


def test_steps_of_epochs_and_shares_of_steps():
    assert with_steps(GRPOConfig(num_train_epochs=1.5), 3.5).max_steps == 6
    assert with_steps(GRPOConfig(max_steps=20, warmup_steps=0.1), None).warmup_steps == 2
    with pytest.raises(ConfigError, match=r"^max_steps=-1: must be set, as train_dataset is a"):
        with_steps(GRPOConfig(), None)
