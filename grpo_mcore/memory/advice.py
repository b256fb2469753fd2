"""What a job could hold at most, and which settings make one fit that does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from grpo_mcore.config import ConfigError, LayoutConfig, TeacherGRPOConfig
from grpo_mcore.memory.job import Job
from grpo_mcore.memory.training import total
from grpo_mcore.parallel.grid import Layout

Make = Callable[[TeacherGRPOConfig], Job]
"""A configuration's job.

Raises ConfigError when it cannot run."""
Setting = tuple[str, object]
"""A dotted key and its value; of "layout" a whole section, that of its option "auto"."""
Candidates = Callable[[TeacherGRPOConfig, Job], Iterator[Setting]]
GPUS_OF_A_NODE = 8
"""The most that an engine is split over; its workers talk at every token."""
TRAINED_AND_TAUGHT = ("teacher", "student")
"""The roles that have layouts to choose; a judge's is its tensor parallel size."""
LEAST_JUDGEMENT = 4096
"""Tokens that a judge's prompt and verdict are left."""


def excess(job: Job) -> float:
    """By how many times the memory of a device each phase exceeds it, summed over phases; 0 where
    the job fits. So does what an engine needs for its weights and one sequence, of its share."""
    if job.device.memory is None:
        return 0.0
    sizes = [
        total(phase) / place.memory for place in job.places() for phase in place.phases.values()
    ]
    sizes += [job.engine_needs(role) for role in job.own_engines]
    return sum(max(0.0, size - 1) for size in sizes)


def remedies(config: TeacherGRPOConfig, job: Job, make: Make) -> tuple[list[Setting], Job]:
    """The settings that make `job`, which `config` describes, fit, found one after the other, and
    the job they make, which may still not fit where nothing more helps."""
    texts = {role: _text(job.layouts[role]) for role in TRAINED_AND_TAUGHT}
    config = replace(config, layout=LayoutConfig(job.placement, **texts))
    changed: dict[str, object] = {}
    while excess(job) > 0:
        found = _best(config, job, make, _splits) or _best(config, job, make, _moves)
        if found is None:
            break
        (key, value), config, job = found
        changed[key] = value
    return list(changed.items()), job


def _best(
    config: TeacherGRPOConfig, job: Job, make: Make, candidates: Candidates
) -> tuple[Setting, TeacherGRPOConfig, Job] | None:
    """The first of the candidates with which `job` fits, or else the one that leaves the least
    excess; None where none leaves less than there is."""
    least, best = excess(job), None
    for setting in candidates(config, job):
        other = with_setting(config, *setting)
        try:
            left = excess(found := make(other))
        except ConfigError:  # what does not divide is no remedy
            continue
        if left < least:
            least, best = left, (setting, other, found)
        if left == 0:
            break
    return best


def largest_micro_batch(config: TeacherGRPOConfig, job: Job, make: Make) -> int | None:
    """The largest `per_device_train_batch_size` with which `job`, which `config` describes, fits,
    all else as it is; None where none does, the memory is not known, or a token budget says the
    size."""
    if config.max_tokens_per_micro_batch is not None or job.device.memory is None:
        return None
    rows = job.config.per_device_train_batch_size * job.config.gradient_accumulation_steps
    for size in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        try:
            if excess(make(replace(config, per_device_train_batch_size=size))) == 0:
                return size
        except ConfigError:  # it does not suit the pipeline, or the accumulation asked for
            continue
    return None


def with_setting(config: TeacherGRPOConfig, key: str, value: object) -> TeacherGRPOConfig:
    """`config` with dotted `key` set to `value`."""
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _splits(config: TeacherGRPOConfig, job: Job) -> Iterator[Setting]:
    """What holds less on each device, that first which costs least time."""
    layout, model, rollout = job.layouts["teacher"], config.teacher, config.rollout
    for role in TRAINED_AND_TAUGHT:
        if getattr(config, role).dtype == "float32":
            yield f"{role}.dtype", "bfloat16"
    if layout.data > 1 and not config.distributed_optimizer:
        yield "distributed_optimizer", True
    if layout.tensor > 1 and not model.sequence_parallel:
        yield "teacher.sequence_parallel", True
    for step in (-0.1, -0.2, 0.1, 0.2):
        share = round(rollout.gpu_memory_utilization + step, 2)
        if 0.1 <= share <= 0.9:
            yield "rollout.gpu_memory_utilization", share
    if config.disable_student_offloading:
        yield "disable_student_offloading", False
    if config.max_tokens_per_micro_batch is not None:
        yield "max_tokens_per_micro_batch", max(1, config.max_tokens_per_micro_batch // 2)
    elif config.per_device_train_batch_size > 1:
        yield "per_device_train_batch_size", config.per_device_train_batch_size // 2
    if model.recompute != "full":
        yield "teacher.recompute", "full"
    for role in TRAINED_AND_TAUGHT:
        now = job.layouts[role]
        if now.data % 2 == 0:
            yield f"layout.{role}", f"{2 * now.tensor}x{now.pipeline}x{now.data // 2}"
            yield f"layout.{role}", f"{now.tensor}x{2 * now.pipeline}x{now.data // 2}"
    if job.placement == "colocated":
        yield "layout", LayoutConfig()
    for role in TRAINED_AND_TAUGHT:
        tensor = getattr(rollout, f"{role}_tensor_parallel")
        if tensor < GPUS_OF_A_NODE:
            yield f"rollout.{role}_tensor_parallel", 2 * tensor
    if "judge" in job.own_engines and job.lengths["judge"] > LEAST_JUDGEMENT:
        yield "judge.max_model_len", max(LEAST_JUDGEMENT, job.lengths["judge"] // 2)


def _moves(config: TeacherGRPOConfig, job: Job) -> Iterator[Setting]:
    """What keeps some of it in the host's memory, at a cost in every step."""
    model = config.teacher
    if model.fp8_param:
        return
    if not config.rollout.offload_policy:
        yield "rollout.offload_policy", True
    is_sharded = config.distributed_optimizer and model.dtype == "bfloat16"
    if is_sharded and config.optimizer_offload_fraction < 1:
        yield "optimizer_offload_fraction", 1.0


def _text(layout: Layout) -> str:
    return f"{layout.tensor}x{layout.pipeline}x{layout.data}"
