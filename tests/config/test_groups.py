"""Every option of every group goes with the others' defaults."""

from pathlib import Path

import pytest

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.config.compose import compose_config

CONFIGS = Path(__file__).resolve().parents[2] / "examples/configs"
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (file.parent.name, file.stem)
    for file in CONFIGS.glob("*/*.yaml")
    if file.parent.name != "experiment"
)
NAMED = ["teacher.path=t", "student.path=s", "data.train=d"]


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_composes(group, option):
    assert compose_config(CONFIGS, "custom", [f"{group}={option}", *NAMED])


def test_the_groups():
    assert {group for group, _ in OPTIONS} >= {
        "model", "data", "trainer", "reward", "reward_system", "layout", "hardware",
    }  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_overrides_go_before_every_experiment(experiment):
    config = compose_config(CONFIGS, experiment, [*NAMED, "beta=0.5"])
    assert (config.teacher.path, config.data.train, config.beta) == ("t", "d", 0.5)


def test_an_experiment_chooses_options_and_an_override_others():
    recipe = compose_config(CONFIGS, "gsm8k_qwen2.5", [])
    assert recipe.teacher.path == "models/Qwen2.5-7B-Instruct"
    assert recipe.teacher.dtype == "bfloat16" and recipe.distributed_optimizer
    assert (recipe.num_prompts_per_step, recipe.data.subset) == (32, "main")
    on_cpu = compose_config(CONFIGS, "gsm8k_qwen2.5", ["hardware=cpu"])
    assert on_cpu.teacher.dtype == "float32" and not on_cpu.distributed_optimizer
    assert on_cpu.teacher.path == recipe.teacher.path
    other = compose_config(CONFIGS, "gsm8k_qwen2.5", ["model=llama3.1_70b_8b"])
    assert other.teacher.path == "models/Llama-3.1-70B-Instruct"


def test_custom_is_the_schema():
    plain = TeacherGRPOConfig()
    plain.teacher.path, plain.student.path, plain.data.train = "t", "s", "d"
    plain.reward_system.cache = "outputs/judgements.sqlite"  # of reward_system=interpretation
    assert compose_config(CONFIGS, "custom", NAMED) == plain
