"""A trained teacher and a student at work, without a trainer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from grpo_mcore import device
from grpo_mcore.checkpoint.stored import StoredModel, check_stored, find_model, settings_of_run
from grpo_mcore.config import ConfigError, ModelConfig, TeacherGRPOConfig
from grpo_mcore.config.bounds import check_bounds
from grpo_mcore.config.compose import override_config
from grpo_mcore.data.tokenizer import load_tokenizer
from grpo_mcore.models.sources import local_model
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join, world_size
from grpo_mcore.preflight.lengths import Lengths
from grpo_mcore.preflight.settings import check_model, check_teaching
from grpo_mcore.preflight.teaching_job import TeachingJob
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion, Request
from grpo_mcore.rollout.start import start_engines
from grpo_mcore.steps.teaching_engines import engine_spec, fill_engines, ready_student
from grpo_mcore.teaching.diagnosis import DiagnosticResult
from grpo_mcore.teaching.student import Student
from grpo_mcore.teaching.tutoring import KEY, Tutoring, TutoringMethods, check_task
from grpo_mcore.trainers.base import BaseTrainer

ROLES = ("teacher", "student")
LONGEST = 4096
"""Tokens of a prompt and its completion, where models have room for more."""


@dataclass(frozen=True)
class Engines:
    """Both roles' engines in this one process.

    Attributes:
        hold: gives the teacher's engine the weights of a model; they have a version.
    """

    student: Student
    teacher: RolloutPool
    hold: Callable[[StoredModel, int], None]

    def generate(self, requests: list[Request]) -> list[Completion]:
        """The teacher's, one a request. On a GPU its engine then sleeps, as the student's does."""
        completions = self.teacher.generate(requests)
        self.teacher.sleep()
        return completions


@contextmanager
def open_engines(
    config: TeacherGRPOConfig, job: TeachingJob, student: StoredModel | None = None
) -> Iterator[Engines]:
    """Starts the engines of both roles, local and for one process; the teacher's hold nothing yet.

    Args:
        student: None: the model in `config.student.path`.
    """
    with (
        join(job.layouts, job.placement, config.rollout.deadline_seconds) as world,
        ExitStack() as cleanup,
    ):
        roles = world.roles

        def start(name: str) -> RolloutPool:
            spec = replace(engine_spec(name, config, job), is_frozen=True)
            engines = job.engines[name]
            pool = start_engines(roles[name], spec, engines, config.rollout, config.output_dir)
            cleanup.callback(pool.close)
            return pool

        pool = start("student")
        # On a GPU an engine takes the memory it finds free, and the student's sleeps once ready.
        teacher = None if device.is_cuda() else start("teacher")
        asked = ready_student(roles["student"], pool, config, job, stored=student)
        teacher = teacher or start("teacher")

        def hold(model: StoredModel, version: int) -> None:
            settings = ModelConfig(model.directory, config.teacher.dtype)
            shape, role = job.shapes["teacher"], roles["teacher"]
            fill_engines(
                teacher,
                shape,
                lambda: model.load(shape, settings, role, config.seed),
                config,
                version,
            )
            teacher.sleep()

        yield Engines(asked, teacher, hold)


@dataclass(frozen=True)
class Tutorial:
    """One task taught: the student's answer alone, what was found, and its answer with guidance."""

    alone: str
    diagnosis: DiagnosticResult
    guidance: str
    taught: str


class Tutor(TutoringMethods):
    """A teacher and a student, in one process, to be asked about one task after another:

    with Tutor("outputs/run/final", "models/student") as tutor:
        print(tutor.teach("Solve: 2x + 5 = 11").guidance)
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        settings: TeacherGRPOConfig | Mapping[str, Any] | None = None,
    ):
        """Checks everything that can be checked before engines start.

        Args:
            teacher, student: each the directory of a model, a run's checkpoint or folder of them, a
                hub id, or a transformers model.
            settings: a configuration, of which models, layouts and data do not count; or settings
                in place of those of the run that made the teacher, whose configuration is found
                with its checkpoints (without one: the defaults).

        Raises:
            ConfigError: for what cannot work.
        """
        if world_size() > 1:
            raise ConfigError(f"WORLD_SIZE={world_size()}: a Tutor is one process")
        if not isinstance(settings, TeacherGRPOConfig):
            settings = run_config(teacher, settings or {})
        config = _for_one_process(settings)
        given = {"teacher": teacher, "student": student}
        models, directory = {}, Path(config.output_dir) / "models"
        for role in ROLES:
            models[role] = find_model(local_model(role, given[role], directory / role))
            model = replace(getattr(config, role), path=models[role].directory)
            config = replace(config, **{role: model})
            check_model(role, model)
        check_bounds(config)
        check_teaching(config)
        shapes = {role: check_stored(role, models[role]) for role in ROLES}
        tokenizers = {role: load_tokenizer(role, models[role].directory) for role in ROLES}
        lengths = Lengths(**{role: min(shapes[role].positions, LONGEST) for role in ROLES})
        layouts = {role: Layout() for role in ROLES}
        self.config, self._models = config, models
        self._job = TeachingJob(
            "colocated", layouts, shapes, tokenizers, [], [], 0, lengths,
            dict.fromkeys(ROLES, 1), 0.0,
        )  # fmt: skip
        self._engines: Engines | None = None
        self._tutoring: Tutoring | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """Starts the engines."""
        if BaseTrainer._open:  # a process is in one world at a time
            BaseTrainer._open.close()
        with ExitStack() as cleanup:
            engines = cleanup.enter_context(
                open_engines(self.config, self._job, self._models["student"])
            )
            engines.hold(self._models["teacher"], 0)
            self._cleanup = cleanup.pop_all()
        self._engines = engines
        self._tutoring = Tutoring(
            engines.student,
            engines.generate,
            self._job.tokenizers,
            self.config,
            vars(self._job.lengths),
        )
        return self

    def __exit__(self, *error) -> None:
        self._engines = self._tutoring = None
        self._cleanup.close()

    def teach(self, task: str, probe_tokens: int = 50, guidance_tokens: int = 200) -> Tutorial:
        """Asks the student, diagnoses it, and asks it again with guidance.

        Raises:
            ValueError: for a task that is empty or too long, or a limit that is too low.
            TypeError: for a task that is no text.
            RuntimeError: when engines fail.
        """
        check_task(task)
        diagnosis = self.diagnostic_probe(task, probe_tokens)
        guidance = self.generate_guidance(task, diagnosis, guidance_tokens)
        student = self._engines.student
        alone, *_ = student.attempts([task], [KEY]).result().texts
        (taught,) = student.taught_answers([task], [guidance], [KEY]).result().texts
        return Tutorial(alone, diagnosis, guidance, taught)

    def _ask_tutor(self, ask: Callable[[Tutoring], Any]) -> Any:
        if self._tutoring is None:
            raise RuntimeError("the Tutor's engines are not open: use it in a `with` statement")
        return ask(self._tutoring)


def run_config(teacher: Any, settings: Mapping[str, Any]) -> TeacherGRPOConfig:
    """The configuration of the run that made `teacher`, or the default one, with `settings`.

    Raises:
        ConfigError: for a setting that is unknown or of the wrong type.
    """
    saved = settings_of_run(str(teacher)) if isinstance(teacher, str | Path) else None
    if saved and "student" not in saved:  # another trainer's
        saved = None
    return override_config(saved or {}, settings)


def _for_one_process(config: TeacherGRPOConfig) -> TeacherGRPOConfig:
    """`config` without what it says of a run's processes."""
    rollout = replace(
        config.rollout,
        engine="local",
        policy_servers=[],
        teacher_servers=[],
        student_servers=[],
        teacher_engines=0,
        student_engines=0,
        teacher_tensor_parallel=1,
        student_tensor_parallel=1,
        offload_policy=False,
        lora_sync="merged",
    )
    models = {role: ModelConfig(dtype=getattr(config, role).dtype) for role in ROLES}
    answer = config.max_answer_tokens or config.max_completion_length
    return replace(config, **models, rollout=rollout, peft_config=None, max_answer_tokens=answer)
