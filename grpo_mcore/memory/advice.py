"""What a job could hold at most, and which settings make one fit that does not."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.memory.job import Job
from grpo_mcore.parallel.grid import Layout

Make = Callable[[TeacherGRPOConfig], Job]
"""A configuration's job.

Raises ConfigError when it cannot run."""
Setting = tuple[str, object]
"""A dotted key and its value."""
_STEPS = 8
"""Settings changed at most."""


def excess(job: Job) -> float:
    """By how much the largest place exceeds its memory, as a share of it: above 1, it does. An
    engine without room for one sequence counts as many times too large as that needs."""
    shares = [place.share for place in job.places()]
    if job.device.is_gpu and job.config.rollout.engine == "local":
        shares += [1 / max(job.sequences_cached(role), 1e-3) for role in job.layouts]
    return max(shares)


def remedies(job: Job, make: Make) -> tuple[list[Setting], Job]:
    """The settings that make `job` fit, one after the other: the first that suffices, or else that
    of all which leaves least; and the job they make, which may still not fit where nothing more
    helps."""
    config = replace(
        job.config,
        layout=replace(
            job.config.layout,
            placement=job.placement,
            **{role: _text(layout) for role, layout in job.layouts.items()},
        ),
    )
    changed: list[Setting] = []
    while excess(job) > 1 and len(changed) < _STEPS:
        tried = []
        for setting in _candidates(config, job):
            other = with_setting(config, *setting)
            try:
                tried.append((excess(found := make(other)), setting, other, found))
            except ConfigError:  # what does not divide is no remedy
                continue
        enough = [entry for entry in tried if entry[0] <= 1]
        best = min(enough[:1] or tried, key=lambda entry: entry[0], default=None)
        if best is None or best[0] >= excess(job):
            break
        _, setting, config, job = best
        changed = [entry for entry in changed if entry[0] != setting[0]] + [setting]
    return changed, job


def largest_micro_batch(job: Job, make: Make) -> int | None:
    """The largest `per_device_train_batch_size` that fits, all else as it is; None where none
    does, or a token budget says the size."""
    config = job.config
    if config.max_tokens_per_micro_batch is not None:
        return None
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    for size in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        other = replace(
            config,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=rows // size,
            steps_per_generation=None,
        )
        try:
            if excess(make(other)) <= 1:
                return size
        except ConfigError:  # it does not suit the pipeline
            continue
    return None


def with_setting(config: TeacherGRPOConfig, key: str, value: object) -> TeacherGRPOConfig:
    """`config` with dotted `key` set to `value`."""
    section, _, name = key.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def _candidates(config: TeacherGRPOConfig, job: Job) -> Iterator[Setting]:
    """What might help, that first which costs least time."""
    layout, model, rollout = job.layouts["teacher"], config.teacher, config.rollout
    if model.dtype == "float32":
        yield "teacher.dtype", "bfloat16"
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
    if not rollout.offload_policy and not model.fp8_param:
        yield "rollout.offload_policy", True
    if layout.data % 2 == 0:
        half = layout.data // 2
        yield "layout.teacher", f"{2 * layout.tensor}x{layout.pipeline}x{half}"
        yield "layout.teacher", f"{layout.tensor}x{2 * layout.pipeline}x{half}"
    for role in job.layouts:
        tensor = 2 * getattr(rollout, f"{role}_tensor_parallel")
        yield f"rollout.{role}_tensor_parallel", tensor
    is_sharded = config.distributed_optimizer and not model.fp8_param
    if is_sharded and model.dtype == "bfloat16" and config.optimizer_offload_fraction < 1:
        yield "optimizer_offload_fraction", 1.0


def _text(layout: Layout) -> str:
    return f"{layout.tensor}x{layout.pipeline}x{layout.data}"
