"""Which layouts a model, a batch and a device allow, and the choice among them."""

from dataclasses import replace
from urllib.parse import urlsplit

from grpo_mcore import device
from grpo_mcore.config import (
    ConfigError,
    ModelConfig,
    RolloutConfig,
    TeacherGRPOConfig,
    TrainingConfig,
)
from grpo_mcore.memory.devices import Device, this_device
from grpo_mcore.memory.training import largest_states
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import fp8_misfit
from grpo_mcore.parallel.auto_layout import fit_role, fit_roles
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import with_batches


def never(shape: ModelShape, model: ModelConfig) -> str | None:
    """Why `model`, which is of `shape`, can have no layout at all; None where it can."""
    if model.expert_parallel > 1 and not shape.experts:
        return "the model has no experts"
    if shape.experts % model.expert_parallel:
        return f"{shape.experts} experts do not divide by it"
    return None


def why_not(layout: Layout, shape: ModelShape, model: ModelConfig) -> str | None:
    """Why `model`, which is of `shape`, cannot be split by `layout`; None where it can."""
    parts = layout.pipeline * model.virtual_pipeline
    if shape.heads % layout.tensor:
        return f"{shape.heads} attention heads do not divide by tensor parallel {layout.tensor}"
    if shape.groups % layout.tensor:
        return f"{shape.groups} key-value heads do not divide by tensor parallel {layout.tensor}"
    for ffn in {shape.ffn, shape.dense_ffn}:
        if ffn % layout.tensor:
            return f"feed-forward size {ffn} does not divide by tensor parallel {layout.tensor}"
    if shape.layers < layout.pipeline:
        return f"{shape.layers} layers are fewer than {layout.pipeline} pipeline stages"
    sizes = shape.stage_layers(layout.pipeline)
    if max(sizes) > 2 * -(-shape.layers // layout.pipeline):
        return (
            f"{shape.layers} layers over {layout.pipeline} pipeline stages would be {sizes[0]}, "
            f"{sizes[1]}, ..., {sizes[-1]}; Megatron wants the inner stages equal"
        )
    if model.virtual_pipeline > 1 and layout.pipeline == 1:
        return f"virtual_pipeline={model.virtual_pipeline} needs more than one pipeline stage"
    if model.virtual_pipeline > 1 and shape.layers % parts:
        return (
            f"{shape.layers} layers do not divide by {layout.pipeline} pipeline stages of "
            f"virtual_pipeline={model.virtual_pipeline} parts"
        )
    if layout.data % model.expert_parallel:
        return (
            f"data parallel {layout.data} does not divide by "
            f"expert_parallel={model.expert_parallel}"
        )
    if model.expert_parallel > 1 and (stage := _stage_without_experts(shape, layout, model)):
        return (
            f"pipeline stage {stage} of {layout.pipeline} would have dense layers only, and with "
            f"expert_parallel={model.expert_parallel} each needs experts"
        )
    if shape.experts and layout.tensor > 1 and not model.sequence_parallel:
        return "a mixture of experts under tensor parallelism needs sequence_parallel=true"
    return fp8_misfit(model, shape, layout)


def _stage_without_experts(shape: ModelShape, layout: Layout, model: ModelConfig) -> int | None:
    """The number, from 1, of a pipeline stage none of whose layers has experts; None where each has
    one. Megatron's optimizer of experts would be missing there."""
    stages = [
        any(map(shape.has_experts, layers))
        for layers in shape.layers_of_stages(layout.pipeline, model.virtual_pipeline)
    ]
    return stages.index(False) + 1 if False in stages else None


def with_experts(layout: Layout, model: ModelConfig) -> Layout:
    """`layout` with its data parallel ranks divided as `model` asks."""
    return replace(layout, expert=model.expert_parallel)


def batch_misfit(config: TrainingConfig, layout: Layout, model: ModelConfig) -> str | None:
    """Why the batch sizes of `config` do not suit the layout of the trained model."""
    try:
        ready = with_batches(config, layout.data)
    except ConfigError as error:
        return str(error)
    parts = ready.gradient_accumulation_steps
    rows = parts * config.per_device_train_batch_size
    needed = layout.pipeline if model.virtual_pipeline > 1 else 1
    if config.max_tokens_per_micro_batch is not None:
        if rows < needed:
            return (
                f"the {rows} sequences of a data parallel rank are less than the {needed} "
                "micro-batches it needs"
            )
    elif parts % needed:
        return (
            f"a data parallel rank's {parts} micro-batches do not divide by {layout.pipeline} "
            "pipeline stages, as a virtual pipeline needs"
        )
    return None


def choose_layout(config: TrainingConfig, shape: ModelShape, world_size: int) -> Layout:
    """The layout of the one model of `config`, as asked for or fitted to `world_size`.

    Raises:
        ConfigError: when what was asked for does not fit, or nothing does.
    """
    model = config.model
    if reason := never(shape, model):
        raise ConfigError(f"model.expert_parallel={model.expert_parallel}: {reason}")

    def misfit(layout: Layout) -> str | None:
        return why_not(layout, shape, model) or batch_misfit(config, layout, model)

    if config.layout != "auto":
        layout = Layout.parse("layout", config.layout)
        if reason := misfit(layout):
            raise ConfigError(f"layout={layout}: {reason}")
        if layout.size != world_size:
            raise ConfigError(
                f"layout={layout}: needs {layout.size} processes, there are {world_size}"
            )
        return with_experts(layout, model)

    def fits(layout: Layout) -> bool:
        return not misfit(layout) and _memory_fits(shape, layout, config, model, this_device())

    layout = fit_role(world_size, fits)
    if layout is None:
        least = Layout(data=world_size)
        if reason := batch_misfit(config, least, model):
            raise ConfigError(f"{reason}; nor do the batch sizes suit another layout=auto")
        raise ConfigError(
            f"layout=auto: no layout of {world_size} processes divides heads, layers and batch and "
            f"fits the memory; {least} does not as {misfit(least) or 'the memory is too small'}"
        )
    return with_experts(layout, model)


def choose_layouts(
    config: TeacherGRPOConfig,
    shapes: dict[str, ModelShape],
    world_size: int,
    target: Device | None = None,
) -> tuple[str, dict[str, Layout]]:
    """Placement and the layout of each role, as asked for or fitted to `world_size`; of a judge
    where it has ranks of its own.

    Args:
        target: the devices they are for; None: this process's.

    Raises:
        ConfigError: when what was asked for does not fit, or nothing does.
    """
    target = target or this_device()
    asked = {
        role: None if text == "auto" else Layout.parse(f"layout.{role}", text)
        for role, text in (("teacher", config.layout.teacher), ("student", config.layout.student))
    }
    for role, layout in asked.items():
        if reason := never(shapes[role], getattr(config, role)):
            value = getattr(config, role).expert_parallel
            raise ConfigError(f"{role}.expert_parallel={value}: {reason}")
        if layout and (reason := why_not(layout, shapes[role], getattr(config, role))):
            raise ConfigError(f"layout.{role}={layout}: {reason}")
    if asked["teacher"] and (reason := batch_misfit(config, asked["teacher"], config.teacher)):
        raise ConfigError(f"layout.teacher={asked['teacher']}: {reason}")

    def teacher_fits(layout: Layout) -> bool:
        return (
            asked["teacher"] in (None, layout)
            and not why_not(layout, shapes["teacher"], config.teacher)
            and not batch_misfit(config, layout, config.teacher)
            and _memory_fits(shapes["teacher"], layout, config, config.teacher, target)
        ) or layout == asked["teacher"]

    def student_fits(layout: Layout) -> bool:
        return asked["student"] in (None, layout) and not why_not(
            layout, shapes["student"], config.student
        )

    placement, judge = config.layout.placement, None
    if placement == "auto":
        placement = "colocated" if world_size == 1 else "separate"
    if config.judge.path and placement == "separate":
        judge = Layout(config.judge.tensor_parallel)
    others = world_size - (judge.size if judge else 0)
    chosen = fit_roles(others, placement, teacher_fits, student_fits)
    if chosen is None:
        raise ConfigError(
            f"layout.teacher={config.layout.teacher} layout.student={config.layout.student} "
            f"layout.placement={config.layout.placement}: does not fit {world_size} processes"
            + (f", {judge.size} of them the judge's" if judge else "")
            + _needed(config, asked)
        )
    _, teacher, student = chosen
    layouts = {
        "teacher": with_experts(teacher, config.teacher),
        "student": with_experts(student, config.student),
    }
    return placement, layouts | ({"judge": judge} if judge else {})


def _needed(config: TeacherGRPOConfig, asked: dict[str, Layout | None]) -> str:
    teacher, student = asked["teacher"], asked["student"]
    if not teacher or not student:
        wishes = [
            f"{role}.{name}={value}"
            for role in asked
            for name in ("expert_parallel", "virtual_pipeline")
            if (value := getattr(getattr(config, role), name)) > 1
        ]
        return "; no layout of this size divides heads, layers and batch, fits the memory" + (
            f" and allows {', '.join(wishes)}" if wishes else ""
        )
    if config.layout.placement == "colocated":
        return f"; colocated roles need {teacher.size} and {student.size} processes to be equal"
    return f"; separate roles need {teacher.size} + {student.size} = {teacher.size + student.size}"


def _memory_fits(
    shape: ModelShape, layout: Layout, config: TrainingConfig, model: ModelConfig, target: Device
) -> bool:
    """Whether a device has room for the states of its share of a model; a third of it is left to
    activations and the engine's weights."""
    if target.memory is None:
        return True
    return (
        largest_states(config, model, shape, with_experts(layout, model)) <= target.memory * 2 / 3
    )


def count_engines(
    rollout: RolloutConfig,
    role: str,
    layout: Layout,
    shape: ModelShape,
    target: Device | None = None,
) -> int:
    """How many engines serve the role; 0 in the settings leaves the choice to us.

    Args:
        target: the devices they run on; None: this process's.

    Raises:
        ConfigError: for a number that does not suit the role's ranks, or the servers given.
    """
    on_gpus = target.is_gpu if target else device.is_cuda()
    if rollout.engine == "server":
        return _count_servers(rollout, role, layout)
    if urls := getattr(rollout, f"{role}_servers"):
        raise ConfigError(f"rollout.{role}_servers={urls}: needs rollout.engine=server")
    tensor = getattr(rollout, f"{role}_tensor_parallel")
    key = f"rollout.{role}_tensor_parallel={tensor}"
    if tensor < 1 or shape.heads % tensor:
        raise ConfigError(f"{key}: {shape.heads} attention heads do not divide by it")
    if shape.groups % tensor and tensor % shape.groups:
        raise ConfigError(
            f"{key}: {shape.groups} key-value heads neither divide by it nor it by them"
        )
    if on_gpus and layout.size % tensor:
        raise ConfigError(f"{key}: the role's {layout.size} devices do not divide by it")
    asked = getattr(rollout, f"{role}_engines")
    if asked == 0:
        return layout.size // tensor if on_gpus else 1
    most = layout.size // tensor if on_gpus else layout.size
    if asked < 0 or asked > most or layout.size % asked:
        raise ConfigError(
            f"rollout.{role}_engines={asked}: must divide the role's {layout.size} ranks "
            f"and be at most {most}"
        )
    return asked


def _count_servers(rollout: RolloutConfig, role: str, layout: Layout) -> int:
    urls = getattr(rollout, f"{role}_servers")
    key = f"rollout.{role}_servers={urls}"
    if not urls:
        raise ConfigError(
            f"{key}: rollout.engine=server needs the URL of a vLLM server; "
            "examples/serve_engine.sh starts one"
        )
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{key}: {url} is no URL such as http://host:8000")
    if len({*urls}) < len(urls):
        raise ConfigError(f"{key}: each engine needs a server of its own")
    other = {"teacher": "student", "student": "teacher"}.get(role)  # both run in one job
    if other and (shared := {*urls} & {*getattr(rollout, f"{other}_servers")}):
        raise ConfigError(f"{key}: {shared.pop()} is in rollout.{other}_servers too")
    if layout.size % len(urls):
        raise ConfigError(f"{key}: {len(urls)} must divide the role's {layout.size} ranks")
    if getattr(rollout, f"{role}_engines") not in (0, len(urls)):
        raise ConfigError(
            f"rollout.{role}_engines={getattr(rollout, f'{role}_engines')}: there are {len(urls)} "
            f"rollout.{role}_servers; leave it 0"
        )
    if getattr(rollout, f"{role}_tensor_parallel") != 1:
        raise ConfigError(
            f"rollout.{role}_tensor_parallel={getattr(rollout, f'{role}_tensor_parallel')}: is the "
            "server's own (--tensor-parallel-size); leave it 1"
        )
    if rollout.quantization:
        raise ConfigError(
            f"rollout.quantization={rollout.quantization}: is the server's own (--quantization); "
            "leave it out"
        )
    return len(urls)
