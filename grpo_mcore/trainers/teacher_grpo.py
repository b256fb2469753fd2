"""Adaptive teaching in two passes: GRPO trains a teacher on how much it helps a frozen student.

The student answers and sketches an approach; the teacher, shown both question and approach, writes
guidance; the student answers again; the reward is the improvement. The loss is conditioned on the
adaptive prompt the guidance was sampled from, not on the bare question.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar

from grpo_mcore.config import (
    ConfigError,
    GroupConfig,
    GRPOConfig,
    LayoutConfig,
    ModelConfig,
    TeacherGRPOConfig,
)
from grpo_mcore.data.questions import Question
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import World, world_size
from grpo_mcore.preflight.judge import check_judge_used
from grpo_mcore.preflight.lengths import check_references
from grpo_mcore.preflight.settings import SAMPLES_FROM_REFERENCE
from grpo_mcore.preflight.teaching_job import check_job, read_questions
from grpo_mcore.rewards import AdaptiveTeachingReward
from grpo_mcore.rewards.named import rewards_of
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.steps.policy_engines import PolicyEngines
from grpo_mcore.steps.sampler import Sampler
from grpo_mcore.steps.scoring import Scoring
from grpo_mcore.steps.session import Attendance, Session
from grpo_mcore.steps.side_roles import JudgeAttendance, JudgeLink, StudentAttendance
from grpo_mcore.steps.teaching_engines import models_away, ready_student, start_role_engines
from grpo_mcore.steps.teaching_sampler import TeachingSampler
from grpo_mcore.teaching.classroom import grader_of
from grpo_mcore.teaching.lesson import LESSON_COLUMNS, Attempt, measures_likelihood
from grpo_mcore.teaching.student import RemoteStudent, answer_of, outcome_of
from grpo_mcore.teaching.tutoring import Tutoring, TutoringMethods
from grpo_mcore.trainers.arguments import UNSET, with_model
from grpo_mcore.trainers.grpo import GRPOTrainer


class TeacherTrainer(TutoringMethods):
    """What ATLAS's trainers of teachers offer of the student beside training (ATLAS, "Trainers
    API"). Every rank calls these methods with the same."""

    args: TeacherGRPOConfig

    @property
    def max_probe_tokens(self) -> int:
        return self.args.max_probe_tokens

    @property
    def student_diagnostic_template(self) -> str:
        return self.args.templates.diagnostic

    @property
    def teacher_adaptive_template(self) -> str:
        return self.args.templates.adaptive

    @property
    def student_with_teaching_template(self) -> str:
        return self.args.templates.with_teaching

    @property
    def student_baseline_template(self) -> str:
        return self.args.templates.baseline

    def _generate_baseline_solutions(self, prompts_text: list[str]) -> list[str]:
        """What the student, alone, gives as its solution of each problem."""
        return [attempt.solutions[0] for attempt in self._attempts(prompts_text)]

    def _generate_student_approaches(self, prompts_text: list[str]) -> list[str]:
        """How the student would go about each problem, in at most `max_probe_tokens`."""
        return [attempt.approach for attempt in self._attempts(prompts_text)]

    def _extract_solutions_from_responses(self, responses: list[str]) -> list[str]:
        """What stands in the <solution> tags of each response; "" without them. With
        `extraction="lenient"` as `data.text.extract_solution_leniently` has it."""
        return [grader_of(self.args).solution(response) for response in responses]

    def _ask_tutor(self, ask: Callable[[Tutoring], Any]) -> Any:
        with self._together() as session:
            if session is None:
                return answer_of(self._session.told)
            outcome = outcome_of(lambda: ask(session.sampler.tutoring))
            session.sampler.student.tell(outcome)
            return answer_of(outcome)

    def _attempts(self, problems: list[str]) -> list[Attempt]:
        """The student's attempts; [] on processes that only carry the student."""
        questions = [Question(number, text, "", {}) for number, text in enumerate(problems)]
        with self._together() as session:
            if session is None:
                return []
            return session.sampler.classroom.ask_attempts(questions, "asked").result()[0]


class TeacherGRPOTrainer(GRPOTrainer, TeacherTrainer):
    """Trains a teacher to teach a frozen student. The same script runs on every rank; what a rank
    does follows from the layout.

    Attributes:
        job: what was found of models and data; set once these are known.
    """

    algorithm = "teacher_grpo"
    accepted: ClassVar[tuple[type, ...]] = (TeacherGRPOConfig, GRPOConfig)

    def __init__(
        self,
        *arguments,
        student_model: Any = None,
        use_reference_teacher_model: bool = False,
        student_model_init_kwargs: dict | None = None,
        logging_prob: float = 0.0,
        disable_student_offloading: bool | None = None,
        **others,
    ):
        """Checks everything that can be checked before models load.

        Args:
            arguments, others: those of GRPOTrainer, with the teacher as `model`. `args` (which may
                also come first) is a TeacherGRPOConfig, whose `teacher`, `student` and `data` say
                what is not given here, or a GRPOConfig. Rewards may ask for the dataset's columns
                and for `questions`, `ground_truths`, the student's extracted `baseline_solutions`
                (a list each) and `solutions`, its whole `baseline_answers` and `answers`,
                `student_approaches`, `teachings`, `teaching_tokens`, and `likelihood_gains` with
                `reference_tokens` (LikelihoodGainReward), for which the student's model is kept
                beside its engines; default: `args.rewards`.
                Datasets have a column `question` or `prompt`, and one of
                the right answer: `answer`, `ground_truth` or `ground_truths`.
            student_model: a path, a hub id or a transformers model; None: the reference model.
            use_reference_teacher_model: the reference model teaches, and the one that is trained
                learns from its guidances.
            student_model_init_kwargs: settings of the student's ModelConfig, such as `dtype`.
            logging_prob: the probability with which all of a step's guidances are logged, and not
                only `args.log_completions` of them.
            disable_student_offloading: in place of `args.disable_student_offloading`.

        Raises:
            ConfigError: for a setting that cannot work.
        """
        self.student_model = student_model
        self.use_reference_teacher_model = use_reference_teacher_model
        self.student_settings = student_model_init_kwargs or {}
        self.disable_student_offloading = disable_student_offloading
        if not 0 <= logging_prob <= 1:
            raise ConfigError(f"logging_prob={logging_prob}: must be between 0 and 1")
        self.logging_prob = logging_prob
        super().__init__(*arguments, **others)

    def _refuse_unused(self, args: GroupConfig) -> None:
        for name in ("environment", "tools", "rollout_func"):
            if getattr(self, name, None):
                raise ConfigError(f"{name}: a teacher answers in one turn; use GRPOTrainer")
        if self.compute_metrics:
            raise ConfigError("compute_metrics: what teaching evaluates has metrics of its own")

    def _with_models(self, args: GroupConfig, model: Any, tokenizer: Any) -> TeacherGRPOConfig:
        revision = getattr(args, "revision", None)
        if not isinstance(args, TeacherGRPOConfig):
            args = teacher_config(args)
        if self.disable_student_offloading is not None:
            args = replace(args, disable_student_offloading=self.disable_student_offloading)
        args = with_model(args, model, tokenizer, "teacher", revision)
        args = replace(args, student=self._with_kwargs(args.student))
        student = self.student_model
        if student is None and args.student.path == UNSET:
            student = self.ref_path or args.teacher.path
        return with_model(args, student, None, "student")

    def _with_kwargs(self, student: ModelConfig) -> ModelConfig:
        settings = dict(self.student_settings)
        if "torch_dtype" in settings:
            settings["dtype"] = settings.pop("torch_dtype")
        if "dtype" in settings:
            settings["dtype"] = str(settings["dtype"]).removeprefix("torch.")
        known = {field.name for field in fields(ModelConfig)} - {"path"}
        for name in settings.keys() - known:
            raise ConfigError(
                f"student_model_init_kwargs.{name}={settings[name]}: choose from torch_dtype, "
                f"{', '.join(sorted(known))}"
            )
        return replace(student, **settings)

    def _is_complete(self) -> bool:
        return self.train_dataset is not None or self.args.data.train != UNSET

    def _prepare(self) -> None:
        self._refuse_unused(self.args)
        if not self._is_complete():
            raise ConfigError("train_dataset=None: give a dataset, here, as data.train or to fit()")
        self.args, self.job = check_job(
            self.args, world_size(), self.train_dataset, self.eval_dataset, self.processing_class
        )
        self._check_reference()
        has_reference = self.args.beta and (self.ref_path or not self.args.peft_config)
        if self.use_reference_teacher_model and not has_reference:
            raise ConfigError(
                "use_reference_teacher_model=True: there is no reference model; set beta above 0, "
                "and with peft_config give ref_model"
            )
        stop = self.args.rollout.mismatch_stop
        if self.use_reference_teacher_model and stop is not None:
            raise ConfigError(
                f"rollout.mismatch_stop={stop}: leave it out with {SAMPLES_FROM_REFERENCE}"
            )
        self.reward_sources = self.reward_sources or rewards_of(self.args)
        check_judge_used(self.reward_sources, self.args.judge.path)
        columns = {*self.job.train[0].columns, *LESSON_COLUMNS}
        self.rewards = self._specs(self.reward_sources, columns)
        for source in self.reward_sources:
            if isinstance(source, AdaptiveTeachingReward) and source.tokenizer is None:
                source.tokenizer = self.job.tokenizer.inner
        if self.measures_likelihood:
            check_references(
                self.args,
                self.job.train + self.job.eval,
                self.job.shapes["student"],
                self.job.tokenizers["student"],
            )

    @property
    def measures_likelihood(self) -> bool:
        return measures_likelihood(self.rewards)

    def _world(self) -> tuple[dict[str, Layout], str, float]:
        return self.job.layouts, self.job.placement, self.args.rollout.deadline_seconds

    def _open_session(self, world: World, cleanup: ExitStack) -> Session | Attendance:
        args, job, roles, mailbox = self.args, self.job, world.roles, world.mailbox
        start = student = judge = None

        def start_engines(name: str) -> RolloutPool:
            pool = start_role_engines(roles[name], args, job, mailbox)
            cleanup.callback(pool.close)
            return pool

        if "judge" in roles:
            return JudgeAttendance(args, world, cleanup)
        if "teacher" in roles:
            if args.judge.path:
                judge = JudgeLink(args, world, cleanup)
            start = self._choose_start(world, "teacher")
        if "student" in roles:
            pool = start_engines("student")
            student = ready_student(roles["student"], pool, args, job, self.measures_likelihood)
        if "teacher" not in roles:
            return StudentAttendance(student, world)
        teacher = roles["teacher"]
        asked = student or RemoteStudent(teacher, mailbox)

        def sampler(engines: PolicyEngines, scoring: Scoring) -> Sampler:
            return TeachingSampler(
                job, args, teacher, engines, scoring, asked, judge, self.logging_prob
            )

        session = self._steps(
            teacher, start_engines("teacher"), start, sampler, self.use_reference_teacher_model
        )
        if student:
            student.pool.make_room = partial(models_away, session.policy, student)
        if judge:
            judge.tell(self.reward_sources)
        return session

    def _open_evals(self, datasets: Any) -> dict[str, list[Question]]:
        return {"eval": read_questions(self.args, self.job, datasets, self.measures_likelihood)}


def teacher_config(args: GRPOConfig) -> TeacherGRPOConfig:
    """The settings of a GRPOConfig for teaching: `model` is the teacher's.

    Raises:
        ConfigError: for settings of GRPOConfig that teaching has no use for.
    """
    plain = GRPOConfig()
    shared = {field.name for field in fields(TeacherGRPOConfig)} - {"layout"}
    # Teaching checks whole sequences against the contexts, not prompts against a limit of theirs.
    dropped = {"model", "layout", "max_prompt_length", "overlong", "revision"}
    for name in sorted({field.name for field in fields(GRPOConfig)} - shared - dropped):
        if getattr(args, name) != getattr(plain, name):
            raise ConfigError(f"{name}={getattr(args, name)}: is of no use to TeacherGRPOTrainer")
    settings = {field.name: getattr(args, field.name) for field in fields(GRPOConfig)}
    settings = {name: value for name, value in settings.items() if name in shared}
    rollout = args.rollout
    settings["rollout"] = replace(
        rollout,
        teacher_servers=rollout.teacher_servers or rollout.policy_servers,
        teacher_engines=rollout.teacher_engines or rollout.policy_engines,
        teacher_tensor_parallel=max(
            rollout.teacher_tensor_parallel, rollout.policy_tensor_parallel
        ),
    )
    config = TeacherGRPOConfig(
        **settings,
        teacher=args.model,
        student=ModelConfig(dtype=args.model.dtype),
        layout=LayoutConfig(teacher=args.layout),
    )
    config.data.overlong = args.overlong
    return config
