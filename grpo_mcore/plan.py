"""`grpo-mcore plan`: the memory of a job, before it runs."""

import sys
from json import dumps
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.config.compose import (
    compose_config,
    override_config,
    parse_overrides,
    read_settings,
)
from grpo_mcore.launch import one_line_errors
from grpo_mcore.memory.advice import largest_micro_batch, remedies
from grpo_mcore.memory.devices import Device, find_device, this_device
from grpo_mcore.memory.job import Job
from grpo_mcore.memory.show import Plan
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import with_batches
from grpo_mcore.preflight.judge import check_judge_placed, check_judge_used
from grpo_mcore.preflight.layouts import choose_layouts, count_engines
from grpo_mcore.preflight.settings import check_settings, check_training
from grpo_mcore.rewards import as_reward_specs
from grpo_mcore.rewards.named import rewards_of
from grpo_mcore.teaching.lesson import measures_likelihood

CONFIGS = Path(__file__).resolve().parents[1] / "examples/configs"


def plan(
    config: str,
    overrides: list[str],
    processes: int | None,
    device_memory: str | None,
    prompt_tokens: int,
    json: Path | None,
) -> None:
    """Prints what the command line (`grpo_mcore.cli`) asks for. Exits with 1 where nothing can be
    planned, and with 0 where the job does not fit, which the plan says."""
    with one_line_errors():
        key = "--device-memory"
        target = find_device(key, device_memory) if device_memory else this_device()
        planned = make_plan(compose(config, overrides), target, processes, prompt_tokens)
        print(planned.as_text())
        if json:
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(dumps(planned.as_json(), indent=2) + "\n")


def compose(name: str, overrides: list[str]) -> TeacherGRPOConfig:
    """The configuration of experiment `name`; or of a file: experiment/NAME.yaml in a directory
    like examples/configs, or any other of settings that are not the defaults, such as a run's
    config.yaml.

    Raises:
        ConfigError: when there is none, and for settings that cannot be.
    """
    if not name.endswith((".yaml", ".yml")):
        return compose_config(CONFIGS, name, overrides)
    file = Path(name)
    directory = file.resolve().parent
    if directory.name == "experiment" and file.is_file():
        return compose_config(directory.parent, file.stem, overrides)
    return override_config(read_settings(f"config={name}", file), parse_overrides(overrides))


def make_plan(
    config: TeacherGRPOConfig,
    target: Device,
    processes: int | None = None,
    prompt_tokens: int = 512,
) -> Plan:
    """The plan of `config` on devices like `target`. Of the models only their config.json is read.

    Args:
        processes: ranks of the job; None: as many as its layouts have, or as this machine starts.
        prompt_tokens: of the longest question in its template.

    Raises:
        ConfigError: for a job that could not run, whatever the memory.
    """
    for key, value in (("--processes", processes), ("--prompt-tokens", prompt_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    check_training(config)
    if target.is_gpu == device.is_cuda():
        check_settings(config)  # what another kind of device can do is not known here
    rewards = rewards_of(config)
    check_judge_used(rewards, config.judge.path)
    roles = ("teacher", "student", *(["judge"] if config.judge.path else []))
    shapes = {role: read_shape(f"{role}.path", getattr(config, role).path) for role in roles}
    keeps_student = measures_likelihood(as_reward_specs(rewards))
    world_size = processes or _world_size(config)

    def make(settings: TeacherGRPOConfig) -> Job:
        return _job(settings, shapes, world_size, target, prompt_tokens, keeps_student)

    job = make(config)
    changed, remedied = remedies(config, job, make)
    return Plan(job, largest_micro_batch(config, job, make), changed, remedied)


def _job(
    config: TeacherGRPOConfig,
    shapes: dict[str, ModelShape],
    world_size: int,
    target: Device,
    prompt_tokens: int,
    keeps_student: bool,
) -> Job:
    placement, layouts = choose_layouts(config, shapes, world_size, target)
    check_judge_placed(config.judge, placement, target.is_gpu)
    config = with_batches(config, layouts["teacher"].data)
    written = config.max_completion_length
    answer = config.max_answer_tokens or written
    needs = {
        "teacher": prompt_tokens + config.max_probe_tokens + written,
        "student": prompt_tokens + max(config.max_probe_tokens, written + answer),
    }
    engines = {
        role: count_engines(config.rollout, role, layouts[role], shapes[role], target)
        for role in needs
    }
    if "judge" in shapes:
        needs["judge"], engines["judge"] = config.judge.max_model_len or sys.maxsize, 1
    return Job(
        config,
        shapes,
        placement,
        layouts,
        engines,
        {role: min(need, shapes[role].positions) for role, need in needs.items()},
        target,
        keeps_student,
    )


def _world_size(config: TeacherGRPOConfig) -> int:
    texts = config.layout.teacher, config.layout.student
    if "auto" in texts:
        return device.local_count()
    sizes = [Layout.parse("layout", text).size for text in texts]
    if config.layout.placement == "colocated":
        return max(sizes)
    return sum(sizes) + (config.judge.tensor_parallel if config.judge.path else 0)
