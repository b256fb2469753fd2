"""Every number and every choice of the configuration is checked by what its field declares."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args

import pytest

from grpo_mcore.config import (
    ConfigError,
    DPOConfig,
    GRPOConfig,
    LoraConfig,
    RolloutConfig,
    SFTConfig,
    TeacherGRPOConfig,
)
from grpo_mcore.config.bounds import check_bounds, kinds_of

CONFIGS = [
    kind(peft_config=LoraConfig()) for kind in (GRPOConfig, TeacherGRPOConfig, SFTConfig, DPOConfig)
]
NEGATIVE = {
    "max_steps", "reward_weights", "entropy_coef", "entropy_coef_min", "entropy_coef_max",
}  # fmt: skip
"""Where -1 is legal: as many steps as the epochs have; what counts against."""
ZERO = {
    # switched off, or none
    "beta", "entropy_coef", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
    "entropy_target", "epsilon", "epsilon_high", "max_grad_norm", "weight_decay", "warmup_steps",
    "stable_steps", "min_learning_rate", "optimizer_offload_fraction", "label_smoothing",
    "top_k", "min_p", "log_completions", "reward_weights", "efficiency_weight",
    "degradation_penalty_multiplier", "vllm_importance_sampling_clip_min",
    "rollout.max_engine_restarts", "peft_config.lora_dropout", "reward_system.max_retries",
    # only at the end, or all
    "eval_steps", "save_steps", "data.eval_size",
    # our choice
    "rollout.policy_engines", "rollout.teacher_engines", "rollout.student_engines",
    # a refusal of its own follows (preflight.settings.check_training)
    "max_steps",
    # an end of a share or of a scale
    "adam_beta1", "adam_beta2", "ref_model_mixup_alpha", "top_entropy_quantile", "seed",
    "student_temperature", "reward_system.temperatures", "reward_system.large_temperature",
    "reward_system.variance_threshold", "reward_system.uncertainty_threshold",
    "reward_system.consistency.process_above_accuracy",
    "reward_system.consistency.weak_process",
    "reward_system.consistency.weak_process_helpfulness",
    "reward_system.consistency.helpfulness_above_diagnostic",
    *(
        f"{model}.bf16_layers_at_{end}"
        for model in ("model", "teacher", "student")
        for end in ("start", "end")
    ),
}  # fmt: skip
"""Where 0 is."""
OF_PAIRS = ("DPOConfig", "beta")
"""Which is no weight of a divergence, but divides by it."""


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that is no section: its dotted key and itself."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, one


def is_number(one: Any) -> bool:
    inner = {part for kind in kinds_of(one.type) for part in (get_args(kind) or (kind,))}
    return bool(inner & {int, float}) or "range" in one.metadata


def is_list(one: Any) -> bool:
    return "list" in str(one.type)


def with_value(config: Any, key: str, value: Any) -> Any:
    section, _, rest = key.partition(".")
    if not rest:
        return replace(config, **{key: value})
    return replace(config, **{section: with_value(getattr(config, section), rest, value)})


def refusal(config: Any, key: str, value: Any) -> str | None:
    try:
        check_bounds(with_value(config, key, value))
    except ConfigError as error:
        return str(error)
    return None


NUMBERS = [
    pytest.param(config, key, one, id=f"{type(config).__name__} {key}")
    for config in CONFIGS
    for key, one in leaves(config)
    if is_number(one)
]


def test_all_numbers_are_found():
    keys = {param.values[1] for param in NUMBERS}
    assert len(keys) > 90
    assert {"beta", "adam_beta2", "rollout.kv_cache_gib", "peft_config.lora_alpha"} <= keys
    assert ZERO - keys == set() and keys >= NEGATIVE


@pytest.mark.parametrize("config, key, one", NUMBERS)
def test_a_number_is_finite_in_range_and_a_number(config, key, one):
    is_whole = int in kinds_of(one.type)
    drawn = {math.nan: False, math.inf: False, -math.inf: False, 1e30: False, "three": False}
    drawn |= {-1: key in NEGATIVE, 0: key in ZERO and (type(config).__name__, key) != OF_PAIRS}
    if one.type is not Any:  # log_completions, where True is all
        drawn[True] = False
    if is_whole:
        drawn[2.5] = False
    for value, is_legal in drawn.items():
        found = refusal(config, key, [value] if is_list(one) else value)
        assert (found is None) == is_legal, (value, found)
        if found:
            assert found.startswith(f"{key}={value!r}: must be "), found
            assert "\n" not in found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_choice_is_one_of_those_declared(config):
    found = [key for key, one in leaves(config) if "choices" in one.metadata]
    assert len(found) >= 6
    for key in found:
        assert refusal(config, key, "nonsense").startswith(f"{key}=nonsense: choose one of ")


def test_a_switch_and_a_section_are_what_they_are():
    with pytest.raises(ConfigError, match="use_kl_in_reward='no': must be True or False"):
        check_bounds(GRPOConfig(use_kl_in_reward="no"))
    with pytest.raises(ConfigError, match="layout='2x1x1': must be a LayoutConfig"):
        check_bounds(TeacherGRPOConfig(layout="2x1x1"))


def test_defaults_are_legal():
    for config in CONFIGS:
        check_bounds(config)


def test_choices_are_those_that_can_be_served():
    from grpo_mcore.config import sections, trainers
    from grpo_mcore.memory.activations import ELEMENT
    from grpo_mcore.models.layers import DTYPES, RECOMPUTE
    from grpo_mcore.models.transformer_engine import RECIPES
    from grpo_mcore.rewards.adaptive import FORMULAS
    from grpo_mcore.rewards.grading import ANSWER_MATCHES, EXTRACTIONS
    from grpo_mcore.rollout.spec import QUANTIZATIONS

    assert sections.DTYPES == tuple(DTYPES) == tuple(ELEMENT)
    assert tuple(RECIPES) == sections.FP8_RECIPES
    assert tuple(FORMULAS) == trainers.FORMULAS
    assert tuple(ANSWER_MATCHES) == trainers.ANSWER_MATCHES
    assert tuple(EXTRACTIONS) == trainers.EXTRACTIONS
    declared = {one.name: one.metadata.get("choices") for one in fields(sections.ModelConfig)}
    assert {None, *declared["recompute"]} == RECOMPUTE.keys()
    declared = {one.name: one.metadata.get("choices") for one in fields(sections.RolloutConfig)}
    assert set(declared["quantization"]) == QUANTIZATIONS.keys()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"learning_rate": 1e10}, "learning_rate=10000000000.0: must be above 0 and at most 1"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"num_generations": 1}, "num_generations=1: must be at least 2"),
        ({"num_generations": 4.0}, "num_generations=4.0: must be a whole number, at least 2"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: must be at least 0 and below 1"),
        ({"beta": math.nan}, "beta=nan: must be at least 0 and at most 1000000000"),
        ({"reward_weights": 1.0}, "reward_weights=1.0: must be a list of numbers"),
        ({"formula": "nonsense"}, "formula=nonsense: choose one of seed, rcl, docs"),
        ({"loss_type": "ppo"}, "loss_type=ppo: choose one of grpo, bnpo, dr_grpo"),
        ({"delta": 0.0}, "delta=0.0: must be above 0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5: must be between 0 and 1"),
        (
            {"rollout": RolloutConfig(mismatch_warn="1.1")},
            "rollout.mismatch_warn='1.1': must be a number, at least 1",
        ),
    ],
)
def test_the_error_says_what_would_be_right(settings, said):
    with pytest.raises(ConfigError) as caught:
        check_bounds(GRPOConfig(**settings))
    assert str(caught.value).startswith(said)
