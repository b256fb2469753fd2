"""`grpo-mcore plan`: the memory of a job, before it runs."""

from json import dumps
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.config.compose import compose_config
from grpo_mcore.config.objective import check_choice
from grpo_mcore.launch import one_line_errors
from grpo_mcore.memory.activations import ELEMENT
from grpo_mcore.memory.advice import largest_micro_batch, remedies
from grpo_mcore.memory.devices import Device, find_device, this_device
from grpo_mcore.memory.job import Job
from grpo_mcore.memory.show import Plan
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.trainers.batches import with_batches
from grpo_mcore.trainers.layouts import choose_layouts, count_engines
from grpo_mcore.trainers.settings import check_settings, check_training

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
    """The configuration of experiment `name`, or of the file experiment/NAME.yaml in a directory
    like examples/configs.

    Raises:
        ConfigError: when there is none, and for settings that cannot be.
    """
    if not name.endswith((".yaml", ".yml")):
        return compose_config(CONFIGS, name, overrides)
    file = Path(name)
    directory = file.resolve().parent
    if not file.is_file() or not (directory.parent / "config.yaml").is_file():
        raise ConfigError(
            f"config={name}: give an experiment's name, or the path of its file in a directory "
            "such as examples/configs"
        )
    return compose_config(directory.parent, file.stem, overrides)


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
    for role in ("teacher", "student"):
        check_choice(f"{role}.dtype", getattr(config, role).dtype, ELEMENT)
    if target.is_gpu == device.is_cuda():
        check_settings(config)  # what another kind of device can do is not known here
    shapes = {
        role: read_shape(f"{role}.path", getattr(config, role).path)
        for role in ("teacher", "student")
    }
    world_size = processes or _world_size(config)

    def make(settings: TeacherGRPOConfig) -> Job:
        return _job(settings, shapes, world_size, target, prompt_tokens)

    job = make(config)
    changed, remedied = remedies(config, job, make)
    return Plan(job, largest_micro_batch(config, job, make), changed, remedied)


def _job(
    config: TeacherGRPOConfig,
    shapes: dict[str, ModelShape],
    world_size: int,
    target: Device,
    prompt_tokens: int,
) -> Job:
    placement, layouts = choose_layouts(config, shapes, world_size, target)
    config = with_batches(config, layouts["teacher"].data)
    written = config.max_completion_length
    answer = config.max_answer_tokens or written
    needs = {
        "teacher": prompt_tokens + config.max_probe_tokens + written,
        "student": prompt_tokens + max(config.max_probe_tokens, written + answer),
    }
    return Job(
        config,
        shapes,
        placement,
        layouts,
        {
            role: count_engines(config.rollout, role, layout, shapes[role], target)
            for role, layout in layouts.items()
        },
        {role: min(need, shapes[role].positions) for role, need in needs.items()},
        target,
    )


def _world_size(config: TeacherGRPOConfig) -> int:
    texts = config.layout.teacher, config.layout.student
    if "auto" in texts:
        return device.local_count()
    sizes = [Layout.parse("layout", text).size for text in texts]
    return max(sizes) if config.layout.placement == "colocated" else sum(sizes)
