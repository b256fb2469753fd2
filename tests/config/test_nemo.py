"""NeMo RL's settings in our words."""

import copy

import pytest

from grpo_mcore.config.nemo import DEFAULTS, SETTINGS, from_arguments, from_nemo
from grpo_mcore.errors import ConfigError

SEED = {
    "policy": {
        "model_name": "Qwen/Qwen2.5-1.5B",
        "learning_rate": 1e-6,
        "dtensor_cfg": {"enabled": True, "tensor_parallel_size": 2},
    },
    "grpo": {"num_prompts_per_step": 64, "num_generations_per_prompt": 8},
}


def with_setting(key: str, value) -> dict:
    config = copy.deepcopy(SEED)
    *sections, name = key.split(".")
    held = config
    for section in sections:
        held = held.setdefault(section, {})
    held[name] = value
    return config


@pytest.mark.seed(60)
def test_the_full_configuration_of_the_documents():
    assert from_nemo(SEED, world_size=4) == {
        "model": "Qwen/Qwen2.5-1.5B",
        "learning_rate": 1e-6,
        "num_prompts_per_step": 64,
        "num_generations": 8,
        "max_sequence_length": 512,
        "layout": "2x1x2",
        "scale_rewards": "group",
        "advantage_estimator": "loo",
    }


@pytest.mark.seed(57, 58, 59)
def test_defaults_of_from_pretrained():
    assert from_arguments({"model_name_or_path": "a/b"}, world_size=1) == {
        "model": "a/b",
        "num_prompts_per_step": 32,
        "num_generations": 16,
        "learning_rate": 1e-6,
        "max_sequence_length": 512,
        "layout": "1x1x1",
        "scale_rewards": "group",
        "advantage_estimator": "loo",
    }


@pytest.mark.seed(62, 63)
@pytest.mark.parametrize(
    "algorithm, defaults",
    [
        ("sft", {"batch_size": 32, "learning_rate": 2e-5, "max_length": 512}),
        ("dpo", {"batch_size": 32, "learning_rate": 1e-6, "max_length": 512, "beta": 0.1}),
    ],
)
def test_defaults_of_the_other_trainers(algorithm, defaults):
    found = from_arguments({"model_name_or_path": "a/b"}, 2, algorithm)
    assert found == {"model": "a/b", "layout": "1x1x2"} | defaults


@pytest.mark.seed(57)
def test_arguments_are_translated_and_ours_are_left_alone():
    found = from_arguments(
        {
            "model_name_or_path": "a/b",
            "num_prompts_per_step": 4,
            "num_generations_per_prompt": 2,
            "learning_rate": 1,
            "max_sequence_length": 64,
            "tensor_parallel_size": 2,
            "output_dir": "there",
            "max_steps": 3,
        },
        world_size=4,
    )
    assert found == {
        "model": "a/b",
        "num_prompts_per_step": 4,
        "num_generations": 2,
        "learning_rate": 1,
        "max_sequence_length": 64,
        "layout": "2x1x2",
        "output_dir": "there",
        "max_steps": 3,
        "scale_rewards": "group",
        "advantage_estimator": "loo",
    }
    assert from_arguments({"model": "a/b", "layout": "1x2x1"}, 4)["layout"] == "1x2x1"


@pytest.mark.seed(58, 59)
@pytest.mark.parametrize("on", [True, False])
def test_advantages_in_both_faces(on):
    arguments = {"normalize_rewards": on, "use_leave_one_out_baseline": on}
    expected = ("group", "loo") if on else ("none", "group")
    config = {"policy": {"model_name": "a/b"}, "grpo": arguments}
    for found in (
        from_nemo(config, 1),
        from_arguments({"model_name_or_path": "a/b"} | arguments, 1),
    ):
        assert (found["scale_rewards"], found["advantage_estimator"]) == expected


@pytest.mark.seed(60)
@pytest.mark.parametrize(
    "policy, layout",
    [
        ({}, "1x1x8"),
        ({"dtensor_cfg": {"enabled": True, "tensor_parallel_size": 4}}, "4x1x2"),
        ({"dtensor_cfg": {"enabled": False, "tensor_parallel_size": 4}}, "1x1x8"),
        (
            {
                "dtensor_cfg": {"enabled": False, "tensor_parallel_size": 8},
                "megatron_cfg": {
                    "enabled": True,
                    "tensor_model_parallel_size": 2,
                    "pipeline_model_parallel_size": 2,
                },
            },
            "2x2x2",
        ),
        ({"megatron_cfg": {"pipeline_model_parallel_size": 2}}, "1x2x4"),
    ],
)
def test_layout_is_that_of_the_section_that_is_enabled(policy, layout):
    config = {"policy": {"model_name": "a/b"} | policy}
    assert from_nemo(config, world_size=8)["layout"] == layout


@pytest.mark.parametrize(
    "key, value, ours",
    [
        ("policy.max_total_sequence_length", 99, {"max_sequence_length": 99}),
        ("policy.train_micro_batch_size", 4, {"per_device_train_batch_size": 4}),
        ("grpo.max_num_steps", 7, {"max_steps": 7}),
    ],
)
def test_settings_without_an_argument(key, value, ours):
    found = from_nemo(with_setting(key, value), 2)
    assert ours.items() <= found.items()


def test_settings_of_the_other_trainers():
    config = {"policy": {"model_name": "a/b", "train_global_batch_size": 16}}
    dpo = {"reference_policy_kl_penalty": 0.2, "max_num_steps": 5}
    found = from_nemo(config | {"dpo": dpo}, 1, "dpo")
    assert found | {"batch_size": 16, "beta": 0.2, "max_steps": 5} == found
    assert from_nemo(config | {"sft": {"max_num_steps": 5}}, 1, "sft")["max_steps"] == 5


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("policy.learning_rat", 1.0, "policy.learning_rat: unknown configuration key; did you mea"),
        ("grpo.colour", "red", "grpo.colour: unknown configuration key; known keys: grpo.max_num_"),
        ("dpo.max_num_steps", 3, "dpo: unknown configuration key; known keys: grpo, policy"),
        ("loss_fn", {}, "loss_fn: unknown configuration key; known keys: grpo, policy"),
        ("policy", 3, "policy=3: is a section; give a dictionary"),
        ("policy.learning_rate", "fast", "policy.learning_rate='fast': must be of type float"),
        ("grpo.num_prompts_per_step", True, "grpo.num_prompts_per_step=True: must be of type int"),
        ("grpo.normalize_rewards", 1, "grpo.normalize_rewards=1: must be of type bool"),
        (
            "policy.dtensor_cfg.tensor_parallel_size",
            3,
            "tensor_parallel_size=3, pipeline_model_par",
        ),
        (
            "policy.dtensor_cfg.tensor_parallel_size",
            0,
            "tensor_parallel_size=0, pipeline_model_par",
        ),
        ("policy.megatron_cfg.enabled", True, "policy.megatron_cfg.enabled=True: so is policy.dte"),
    ],
)
def test_refusals(key, value, message):
    with pytest.raises(ConfigError) as caught:
        from_nemo(with_setting(key, value), world_size=4)
    assert str(caught.value).startswith(message)


def test_one_setting_under_two_names():
    config = with_setting("policy.max_total_sequence_length", 9)
    config["policy"]["max_sequence_length"] = 9
    with pytest.raises(ConfigError, match=r"max_sequence_length=9: policy\.max_.* says it too"):
        from_nemo(config, 2)
    for arguments in (
        {"num_generations_per_prompt": 8, "num_generations": 4},
        {"tensor_parallel_size": 1, "layout": "1x1x1"},
        {"model_name_or_path": "c/d"},
    ):
        with pytest.raises(ConfigError, match="says it too; give one of them"):
            from_arguments({"model": "a/b"} | arguments, 1)


def test_a_model_is_needed():
    with pytest.raises(ConfigError, match=r"policy\.model_name: is missing"):
        from_nemo({"policy": {}}, 1)
    with pytest.raises(ConfigError, match="model_name_or_path: is missing"):
        from_arguments({}, 1)


def test_every_default_is_of_a_setting():
    for algorithm, defaults in DEFAULTS.items():
        assert defaults.keys() <= {setting.ours for setting in SETTINGS[algorithm]}
