"""Settings of the objective that cannot work are refused by name."""

import pytest

from grpo_mcore.config.objective import LOSS_TYPES, ObjectiveConfig, check_objective
from grpo_mcore.errors import ConfigError


def refusal(**settings) -> str:
    with pytest.raises(ConfigError) as caught:
        check_objective(ObjectiveConfig(**settings))
    return str(caught.value)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_works(loss_type):
    settings = {
        "cispo": {"epsilon_high": 5.0},
        "vespo": {"vllm_importance_sampling_mode": "token_truncate"},
    }
    check_objective(ObjectiveConfig(loss_type=loss_type, **settings.get(loss_type, {})))


def test_what_trl_has_by_default_we_have():
    """But for beta, 0.04 as in ATLAS."""
    trl = pytest.importorskip("trl")
    shared = vars(ObjectiveConfig()).keys() & trl.GRPOConfig.__dataclass_fields__.keys() - {"beta"}
    assert len(shared) > 20
    for name in shared:
        assert getattr(ObjectiveConfig, name) == getattr(trl.GRPOConfig, name), name


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("entropy_coef_min", 2.0, "must be at most entropy_coef_max=1.0"),
        ("vllm_importance_sampling_clip_min", 3.0, "must be below vllm_importance_sampling_clip_"),
    ],
)
def test_number_that_does_not_go_with_another(key, value, expected):
    assert refusal(**{key: value}).startswith(f"{key}={value}: {expected}")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"loss_type": "cispo"}, ["epsilon_high=None", "loss_type=cispo", "5.0"]),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"},
            ["vllm_importance_sampling_mode=sequence_mask", "loss_type=vespo", "token_mask"],
        ),
        (
            {"use_kl_in_reward": True, "multi_objective_aggregation": "normalize_then_sum"},
            ["use_kl_in_reward=True", "multi_objective_aggregation=sum_then_normalize"],
        ),
        (
            {
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            ["vllm_importance_sampling_clip_max=None", "vllm_importance_sampling_clip_min"],
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, words):
    message = refusal(**settings)
    assert all(word in message for word in words)


def test_masks_need_no_bounds():
    for mode in ("token_mask", "sequence_mask"):
        check_objective(
            ObjectiveConfig(
                vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=None
            )
        )


def test_correction_that_is_off_may_be_anything():
    check_objective(
        ObjectiveConfig(
            loss_type="vespo",
            vllm_importance_sampling_correction=False,
            vllm_importance_sampling_clip_max=None,
        )
    )
