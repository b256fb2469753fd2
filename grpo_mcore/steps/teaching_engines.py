"""The engines of teacher and student, filled with their models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch.nn import ModuleList

from grpo_mcore.checkpoint.random_state import random_state, restore_random_state
from grpo_mcore.checkpoint.stored import StoredModel
from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import Mailbox
from grpo_mcore.preflight.teaching_job import TeachingJob
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.spec import EngineSpec
from grpo_mcore.rollout.start import spec_of_trained, start_engines
from grpo_mcore.teaching.student import LocalStudent, Student
from grpo_mcore.training.likelihood import FrozenModel
from grpo_mcore.training.policy import Policy, release
from grpo_mcore.weights.sync import WeightSync

FROZEN = 0
"""The version of the student's weights, for ever."""


def start_role_engines(
    role: Role, config: TeacherGRPOConfig, job: TeachingJob, mailbox: Mailbox | None = None
) -> RolloutPool:
    """Starts the engines of the teacher or the student (`start_engines`)."""
    spec, engines = engine_spec(role.name, config, job), job.engines[role.name]
    return start_engines(role, spec, engines, config.rollout, config.output_dir, mailbox)


def engine_spec(role: str, config: TeacherGRPOConfig, job: TeachingJob) -> EngineSpec:
    """What the engines of the teacher or the student are started with."""
    rollout, tokenizer = config.rollout, job.tokenizers[role]
    if role == "teacher":
        spec = spec_of_trained(
            config, config.teacher, tokenizer, job.lengths.teacher, rollout.teacher_tensor_parallel
        )
        return replace(spec, tokenizer=tokenizer.inner)  # a diagnosis holds grades to a form
    return EngineSpec(
        config.student.path,
        config.student.dtype,
        job.lengths.student,
        tokenizer.stop_token_ids(),
        rollout.student_tensor_parallel,
        is_frozen=True,
    )


def ready_student(
    role: Role,
    pool: RolloutPool,
    config: TeacherGRPOConfig,
    job: TeachingJob,
    keeps_model: bool = False,
    stored: StoredModel | None = None,
) -> Student:
    """Loads the student's shards in its own layout and hands them to its engines, once, and again
    to those that have to be restarted.

    Args:
        keeps_model: the shards stay, for log-likelihoods; else they are loaded for each time.
        stored: None: what is in `config.student.path`.
    """
    shape, stored = job.shapes["student"], stored or StoredModel(config.student.path)
    model = FrozenModel(role, shape, config.student, config) if keeps_model else None

    def load() -> ModuleList:
        if model:
            model.return_to_device()
            return model.chunks
        return stored.load(shape, config.student, role, config.seed)

    fill_engines(pool, shape, load, config, FROZEN, keeps_model)
    kind = LocalStudent if job.placement == "colocated" else Student
    student = kind(pool, job.tokenizers["student"], config, model)
    pool.make_room = student.away
    student.rest()
    return student


@contextmanager
def models_away(policy: Policy, student: Student) -> Iterator[None]:
    """Teacher and student are off the device, which they share."""
    with policy.away(), student.away():
        yield


def fill_engines(
    pool: RolloutPool,
    shape: ModelShape,
    load: Callable[[], ModuleList],
    config: TeacherGRPOConfig,
    version: int,
    keeps: bool = False,
) -> None:
    """Hands what `load` loads to the engines, and again to those that have to be restarted; unless
    it `keeps` that, it is released each time."""

    def fill() -> None:
        chunks = load()
        pool.wait_until_ready()
        WeightSync(chunks, shape, pool.role, pool, config.rollout.bucket_megabytes).push(version)
        if not keeps:
            release(chunks)

    def refill() -> None:
        state = random_state()  # loading seeds the generators, which the teacher uses meanwhile
        try:
            fill()
        finally:  # what is saved when engines fail goes on from here
            restore_random_state(state)

    fill()
    pool.refill = refill
