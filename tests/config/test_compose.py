"""A mistake in the configuration is one line that names the key and what would fit."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_mcore.config import ConfigError, LoraConfig, TeacherGRPOConfig
from grpo_mcore.config.compose import (
    compose_config,
    keys_of,
    override_config,
    parse_overrides,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples/configs"


def refusal(*overrides: str, experiment: str = "demo", configs: Path = CONFIGS) -> str:
    """The line with which these settings are refused."""
    with pytest.raises(ConfigError) as caught:
        compose_config(configs, experiment, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def edited(tmp_path):
    """Refuses the demo with `text` appended to its file."""

    def refuse(text: str) -> str:
        configs = tmp_path / "configs"
        shutil.copytree(CONFIGS, configs)
        with (configs / "experiment/demo.yaml").open("a") as file:
            file.write(text + "\n")
        return refusal(configs=configs)

    return refuse


def test_experiments_compose_to_the_dataclasses():
    demo = compose_config(CONFIGS, "demo", [])
    gsm8k = compose_config(CONFIGS, "gsm8k_qwen2.5", [])
    assert isinstance(demo, TeacherGRPOConfig) and isinstance(gsm8k, TeacherGRPOConfig)
    assert demo.teacher.path == "outputs/demo/seed-0/models/teacher"
    assert demo.templates.baseline == "question : {question} answer :"
    assert gsm8k.teacher.dtype == "bfloat16" and gsm8k.data.subset == "main"
    assert gsm8k.templates == TeacherGRPOConfig().templates


def test_overrides_come_last():
    config = compose_config(
        CONFIGS, "demo", ["layout=demo", "layout.student=2x1x1", "seed=3", "epsilon_high=0.28"]
    )
    assert (config.layout.teacher, config.layout.student) == ("2x2x1", "2x1x1")
    assert (config.seed, config.output_dir) == (3, "outputs/demo/seed-3/run")
    assert config.epsilon_high == 0.28


def test_every_field_has_a_key():
    keys = keys_of(TeacherGRPOConfig)
    assert {f.name for f in dataclasses.fields(TeacherGRPOConfig)} <= keys.keys()
    assert keys["teacher.path"] is str and keys["rollout.kv_cache_gib"] is float


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("learning_rat=1", "learning_rate"),
        ("teacher.pth=x", "teacher.path"),
        ("techer.path=x", "teacher.path"),
        ("data.trian=x", "data.train"),
        ("rollout.learning_rate=1", "learning_rate"),
        ("student_engines=2", "rollout.student_engines"),
        ("teacher={pth: x}", "teacher.path"),
        ("+max_step=1", "max_steps"),
        ("hardwear=cpu", "hardware"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(override, nearest):
    message = refusal(override)
    assert "unknown configuration key" in message
    assert message.endswith(f"did you mean {nearest}?")


def test_unknown_key_like_no_other_is_answered_with_its_section():
    message = refusal("rollout.zzz=1")
    assert "rollout.zzz" in message and "rollout.kv_cache_gib" in message
    assert "learning_rate" not in message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("learning_rte: 1", ("learning_rte: unknown", "learning_rate?")),
        ("layout: {techer: 2x1x1}", ("layout.techer: unknown", "layout.teacher?")),
        ("max_stepz: 1", ("max_stepz: unknown", "max_steps?")),
        ("top_p: high", ("top_p=high", "expected a number")),
        ("layout: demo", ("experiment/demo", "LayoutConfig")),
        ("top_k: [", ("demo.yaml", "line")),
    ],
)
def test_mistakes_in_a_file(edited, text, parts):
    message = edited(text)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("max_steps=abc", "a whole number"),
        ("max_steps=1.5", "a whole number"),
        ("beta=null", "a number"),
        ("async_save=maybe", "true or false"),
        ("teacher.path=null", "text"),
        ("output_dir=[1]", "text"),
        ("teacher=big", "a section with path, dtype"),
    ],
)
def test_wrong_type_names_key_value_and_what_fits(override, expected):
    assert refusal(override).startswith(f"{override}: expected {expected}")


def test_unknown_experiment_lists_those_there_are():
    assert refusal(experiment="nope") == (
        "experiment=nope: choose one of custom, demo, gsm8k_llama3.1_70b, gsm8k_qwen2.5"
    )


@pytest.mark.parametrize("value", ["zz", "null", "{teacher: 2x1x1}"])
def test_unknown_option_of_a_group_lists_those_there_are(value):
    assert refusal(f"layout={value}") == (
        f"layout={value}: choose one of auto, colocated, demo, nodes_8"
    )


def test_missing_value_is_asked_for():
    assert refusal("data.train=???").startswith("data.train: no value; give one")


@pytest.mark.parametrize(
    "override",
    [
        "max_steps",
        "=3",
        "",
        "max_steps=[1",
        "max_steps=1,2",
        "~max_steps",
        "++seed=3",
        "templates.baseline=solve {question}",
        "layout@here=auto",
    ],
)
def test_what_is_not_key_and_value_is_refused(override):
    message = refusal(override)
    assert (override or "''") in message and "expected KEY=VALUE" in message


def test_importing_the_configuration_loads_neither_torch_nor_vllm():
    program = (
        "import sys, grpo_mcore, grpo_mcore.config, grpo_mcore.config.compose;"
        "loaded = {'torch', 'vllm', 'megatron', 'transformers'} & sys.modules.keys();"
        "sys.exit(f'loads {loaded}' if loaded else 0)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "overrides, adapters",
    [
        (["peft_config={r: 4}"], LoraConfig(r=4)),
        (["peft_config.r=4", "peft_config.lora_alpha=2"], LoraConfig(r=4, lora_alpha=2.0)),
        (["peft_config={}"], LoraConfig()),
        (["peft_config.r=4", "peft_config=null"], None),
    ],
)
def test_a_section_that_is_null_can_be_set_in_part(overrides, adapters):
    assert compose_config(CONFIGS, "demo", overrides).peft_config == adapters
    settings = parse_overrides(overrides)
    assert override_config({}, settings).peft_config == adapters


def test_mistakes_in_a_section_that_is_null():
    assert refusal("peft_config={rank: 4}").startswith("peft_config.rank: unknown configuration")
    assert refusal("peft_config.r=x") == "peft_config.r=x: expected a whole number"
    assert refusal("peft_config={r: x}") == "peft_config.r=x: expected a whole number"


def test_sampling_in_words():
    config = compose_config(
        CONFIGS, "demo", ["stop=['</teaching>']", "structured_outputs={regex: 'a+'}"]
    )
    assert config.stop == ["</teaching>"]
    assert config.structured_outputs == {"regex": "a+"}
