"""Adaptive teaching in two passes: GRPO trains a teacher on how much it helps a frozen student.

The student answers and sketches an approach; the teacher, shown both question and approach, writes
guidance; the student answers again; the reward is the improvement. The loss is conditioned on the
adaptive prompt the guidance was sampled from, not on the bare question.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.checkpoint.random_state import random_state, restore_random_state
from grpo_mcore.config import (
    ConfigError,
    GroupConfig,
    GRPOConfig,
    LayoutConfig,
    ModelConfig,
    TeacherGRPOConfig,
)
from grpo_mcore.data.questions import Question
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import Mailbox, World, world_size
from grpo_mcore.report.html import write_report
from grpo_mcore.rewards import AdaptiveTeachingReward, Scores
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.samples import Rollouts, Sample
from grpo_mcore.rollout.spec import EngineSpec
from grpo_mcore.teaching.classroom import Classroom, PendingAttempts, grader_of
from grpo_mcore.teaching.lesson import Attempt, Lesson, summarise
from grpo_mcore.teaching.student import (
    LocalStudent,
    RemoteStudent,
    Student,
    answer_of,
    outcome_of,
    serve,
)
from grpo_mcore.teaching.tutoring import Tutoring, TutoringMethods
from grpo_mcore.trainers.arguments import UNSET, with_model
from grpo_mcore.trainers.base import Attendance, Session
from grpo_mcore.trainers.engines import spec_of_trained, start_engines
from grpo_mcore.trainers.grpo import GRPOTrainer
from grpo_mcore.trainers.grpo_session import GRPOSession
from grpo_mcore.trainers.judges import JudgeAttendance, JudgeLink, check_judge_used
from grpo_mcore.trainers.lengths import check_references
from grpo_mcore.trainers.loop import Start
from grpo_mcore.trainers.named_rewards import rewards_of
from grpo_mcore.trainers.preflight import Job, check_job, read_questions
from grpo_mcore.trainers.settings import check_settings
from grpo_mcore.trainers.stored import StoredModel
from grpo_mcore.training.likelihood import FrozenModel
from grpo_mcore.training.policy import release
from grpo_mcore.weights.sync import WeightSync

SHOWN = {
    "reward": "reward {:+.3f}",
    "baseline_accuracy": "alone {:.2f}",
    "student_accuracy": "taught {:.2f}",
    "likelihood_gain": "gain {:+.3f}",
    "kl": "kl {:.4f}",
    "grad_norm": "grad {:.2f}",
    "time/step": "{:.1f} s",
    "eval_sampled_baseline_accuracy": "alone {:.3f}",
    "eval_sampled_student_accuracy": "taught {:.3f}",
    "eval_greedy_student_accuracy": "(greedy {:.3f})",
    "eval_sampled_non_degradation": "kept {:.3f}",
    "eval_sampled_teaching_length_mean": "tokens {:.1f}",
}
LIKELIHOOD_GAINS = "likelihood_gains"
"""The column that is measured only where a reward function names it; else it holds None."""
LESSON_COLUMNS: dict[str, Callable[[Lesson], object]] = {
    "questions": lambda lesson: lesson.attempt.question.text,
    "ground_truths": lambda lesson: lesson.attempt.question.answer,
    "baseline_solutions": lambda lesson: lesson.attempt.solutions,
    "solutions": lambda lesson: lesson.solution,
    "baseline_answers": lambda lesson: lesson.attempt.baselines,
    "answers": lambda lesson: lesson.answer,
    "student_approaches": lambda lesson: lesson.attempt.approach,
    "teachings": lambda lesson: lesson.teaching,
    "teaching_tokens": lambda lesson: lesson.teaching_tokens,
    LIKELIHOOD_GAINS: lambda lesson: lesson.likelihood_gain,
    "reference_tokens": lambda lesson: lesson.attempt.reference_tokens,
}
"""What reward functions are offered beside the dataset's columns."""
USES_REFERENCE = (
    "use_reference_teacher_model=True: the model that samples is not the one that is trained"
)
FROZEN = 0
"""The version of the student's weights, for ever."""


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
            outcome = outcome_of(lambda: ask(session.tutoring))
            session.student.tell(outcome)
            return answer_of(outcome)

    def _attempts(self, problems: list[str]) -> list[Attempt]:
        """The student's attempts; [] on processes that only carry the student."""
        questions = [Question(number, text, "", {}) for number, text in enumerate(problems)]
        with self._together() as session:
            if session is None:
                return []
            return session.classroom.ask_attempts(questions, "asked").result()[0]


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
        check_settings(self.args)
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
            raise ConfigError(f"rollout.mismatch_stop={stop}: leave it out with {USES_REFERENCE}")
        self.reward_sources = self.reward_sources or rewards_of(self.args)
        check_judge_used(self.reward_sources, self.args.judge.path)
        columns = {*self.job.train[0].columns, *LESSON_COLUMNS}
        self.rewards = self._specs(self.reward_sources, columns)
        for source in self.reward_sources:
            if isinstance(source, AdaptiveTeachingReward) and source.tokenizer is None:
                source.tokenizer = self.job.tokenizer.inner
        if self.measures_likelihood:
            check_references(self.args, self.job, self.job.train + self.job.eval)

    @property
    def measures_likelihood(self) -> bool:
        """Whether a reward wants to know how likely the student finds the right answers."""
        return any(spec.asks_for(LIKELIHOOD_GAINS) for spec in self.rewards)

    def _world(self) -> tuple[dict[str, Layout], str, float]:
        return self.job.layouts, self.job.placement, self.args.rollout.deadline_seconds

    def _open_session(self, world: World, cleanup: ExitStack) -> Session | Attendance:
        start = student = judge = None
        if "judge" in world.roles:
            return JudgeAttendance(self.args, world, cleanup)
        if "teacher" in world.roles:
            if self.args.judge.path:
                judge = JudgeLink(self.args, world, cleanup)
            start = self._choose_start(world, "teacher")
        if "student" in world.roles:
            pool = start_role_engines(world.roles["student"], self.args, self.job, world.mailbox)
            cleanup.callback(pool.close)
            student = ready_student(
                world.roles["student"], pool, self.args, self.job, self.measures_likelihood
            )
        if "teacher" not in world.roles:
            return StudentAttendance(student, world)
        pool = start_role_engines(world.roles["teacher"], self.args, self.job, world.mailbox)
        cleanup.callback(pool.close)
        session = TeacherSession(self, world, pool, start, student, judge)
        if judge:
            judge.tell(self.reward_sources)
        return session

    def _open_evals(self, datasets: Any) -> dict[str, list[Question]]:
        return {"eval": self.read_further(datasets)}

    def read_further(self, dataset: Any) -> list[Question]:
        """Questions beside the trainer's own.

        Raises:
            ConfigError: for what is no dataset of questions, or too long.
        """
        questions = read_questions(self.args, self.job, dataset)
        if self.measures_likelihood:
            check_references(self.args, self.job, questions)
        return questions


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


class StudentAttendance(Attendance):
    """Processes that carry only the student."""

    def __init__(self, student: Student, world: World):
        self.student, self.world, self.answered = student, world, 0
        self.told: Any = None
        """By the teacher's processes, when last served."""

    def serve(self) -> None:
        role, mailbox = self.world.roles["student"], self.world.mailbox
        self.answered, self.told = serve(self.student, role, mailbox, self.answered)


def start_role_engines(
    role: Role, config: TeacherGRPOConfig, job: Job, mailbox: Mailbox | None = None
) -> RolloutPool:
    """Starts the engines of the teacher or the student (`start_engines`)."""
    spec, engines = engine_spec(role.name, config, job), job.engines[role.name]
    return start_engines(role, spec, engines, config.rollout, config.output_dir, mailbox)


def engine_spec(role: str, config: TeacherGRPOConfig, job: Job) -> EngineSpec:
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
    job: Job,
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


class TeacherSession(GRPOSession):
    """The steps, on the teacher's ranks."""

    def __init__(
        self,
        trainer: TeacherGRPOTrainer,
        world: World,
        pool: RolloutPool,
        start: Start,
        local: LocalStudent | None,
        judge: JudgeLink | None,
    ):
        self.judge = judge
        self.prefetched: dict[str, PendingAttempts] = {}
        self.recorded: dict[str, dict] = {}
        config, job = trainer.args, trainer.job
        self.student = local or RemoteStudent(world.roles["teacher"], world.mailbox)
        self.classroom = Classroom(
            self.student, self.sample_policy, job.tokenizer, config, trainer.measures_likelihood
        )
        self.tutoring = Tutoring(
            self.student, self.sample_policy, job.tokenizers, config, vars(job.lengths)
        )
        super().__init__(trainer, world, pool, start)
        if local:
            local.pool.make_room = self._models_away

    @contextmanager
    def _models_away(self) -> Iterator[None]:
        """Teacher and student are off the device."""
        with self.policy.away(), self.student.away():
            yield

    def sampled_model(self) -> ModuleList:
        if self.trainer.use_reference_teacher_model:
            return self.reference.chunks
        return super().sampled_model()

    def step_recorded(self, step: int, metrics: dict[str, float]) -> None:
        if self.trainer.use_reference_teacher_model:
            self.sampled_by = [replace(h, model="reference") for h in self.sampled_by]
        super().step_recorded(step, metrics)

    def why_incomparable(self) -> str | None:
        if self.trainer.use_reference_teacher_model:
            return USES_REFERENCE
        return super().why_incomparable()

    def shown(self) -> dict[str, str]:
        return SHOWN

    @property
    def evaluates(self) -> bool:
        return bool(self.job.eval)

    def roll_out(self, numbers: list[int], key: str) -> Rollouts:
        """Guidances for the questions `numbers`, and what the student makes of them."""
        phases, config = self.phases, self.config
        questions = [self.job.train[number] for number in numbers]
        with phases("attempts"):
            attempts = self.attempts_of(questions, key)
        return self.teach(attempts, key, config.num_generations)

    def roll_out_given(self, rows: Sequence[dict]) -> Rollouts:
        questions = self.trainer.read_further(list(rows))
        attempts, _ = self.classroom.ask_attempts(questions, "asked").result()
        return self.teach(attempts, "asked", self.config.num_generations)

    def teach(self, attempts: list[Attempt], key: str, copies: int) -> Rollouts:
        phases = self.phases
        with phases("guidance"):
            guidance = self.classroom.guide(attempts, key, copies, self.config.temperature)
        with phases("taught"):
            texts = self.classroom.texts(guidance)
            lessons = self.classroom.teach(attempts, texts, key)
        self._add_seconds("student_likelihoods", self.classroom.scoring_seconds)
        questions = [lesson.attempt.question for lesson in lessons]
        names = questions[0].columns.keys() - {"prompts", "completions"}
        columns = {name: [q.columns[name] for q in questions] for name in names}
        columns |= {
            name: [read(lesson) for lesson in lessons] for name, read in LESSON_COLUMNS.items()
        }
        return Rollouts(
            [Sample.of(g.prompt, g.completion) for g in guidance],
            [self.tokenizer.decode(g.prompt) for g in guidance],
            [lesson.guidance for lesson in lessons],
            columns,
            lessons,
        )

    def describe(self, rollouts: Rollouts, scores: Scores, copies: int) -> dict[str, float]:
        lessons = rollouts.lessons
        metrics = super().describe(rollouts, scores, copies)
        metrics |= self.role.once(lambda: summarise(lessons))  # math may take its time limit
        approaches = [self.tokenizer.encode(lesson.attempt.approach) for lesson in lessons]
        metrics["student_approach_length"] = fmean(map(len, approaches))
        if "reward" in metrics and metrics["teaching_length_mean"]:
            hundreds = metrics["teaching_length_mean"] / 100
            metrics["token_efficiency"] = metrics["reward"] / hundreds
        return metrics

    def look_ahead(self, generation: int) -> None:
        """Asks the student for the attempts of `generation` without waiting. They do not depend on
        the teacher, so the student makes them while the teacher trains."""
        first_step = self.cycle.first_step(generation)
        if first_step < self.config.max_steps:
            numbers = self._next_prompts(self.prompts_per_generation)
            questions = [self.job.train[number] for number in numbers]
            self.ask_attempts(questions, f"step {generation}")

    def ask_attempts(self, questions: list[Question], key: str) -> PendingAttempts:
        """The attempts under `key`: already asked for, in the checkpoint, or asked for now."""
        if key not in self.prefetched:
            record = self.recorded.pop(key, None)
            recalled = self.classroom.recall_attempts(questions, record) if record else None
            self.prefetched[key] = recalled or self.classroom.ask_attempts(questions, key)
        return self.prefetched[key]

    def attempts_of(self, questions: list[Question], key: str) -> list[Attempt]:
        """The attempts under `key`, and how much of the student's time training has hidden."""
        self.ask_attempts(questions, key)
        attempts, work = self.prefetched.pop(key).result()
        since, until = self.training_span
        hidden = max(0.0, min(work.finished, until) - max(work.started, since))
        self._add_seconds("student_attempts", work.finished - work.started)
        self._add_seconds("student_attempts_during_training", hidden)
        self._add_seconds("student_likelihoods", work.scoring_seconds)
        return attempts

    def _add_seconds(self, phase: str, seconds: float) -> None:
        """Of the student's work in this step; with dynamic sampling it works several times."""
        self.phases.seconds[phase] = self.phases.seconds.get(phase, 0.0) + seconds

    def _train_step(self, step: int) -> dict[str, float]:
        metrics = super()._train_step(step)
        if seconds := metrics.get("time/student_attempts"):
            hidden = metrics["time/student_attempts_during_training"]
            metrics["time/student_hidden_share"] = hidden / seconds
        return metrics

    def evaluate(self, datasets: dict[str, list[Question]] | None = None) -> dict[str, float]:
        """Teaches the held-out questions. The student is frozen, so it attempts them once."""
        self.sync_engines()
        metrics = {}
        for name, questions in (datasets or {"eval": self.job.eval}).items():
            own = datasets is None  # which are asked again and again
            ask = self.ask_attempts if own else self.classroom.ask_attempts
            attempts, _ = ask(questions, name).result()
            for way, lessons in self.classroom.evaluate(attempts, name).items():
                found = self.role.once(lambda lessons=lessons: summarise(lessons))
                metrics |= {f"{way}_{metric}": value for metric, value in found.items()}
        return metrics

    def log_completions(self, rollouts: Rollouts, scores: Scores, rewards: Tensor) -> None:
        """Records some of the lessons, and all that changed what the student can do."""
        if not self.loop.progress:
            return
        names = [spec.name for spec in self.trainer.rewards]
        rows = [
            lesson.record()
            | {
                "guidance_tokens": len(rollouts.samples[i].tokens),
                "reward": _as_json(rewards[i]),
                "rewards": dict(zip(names, map(_as_json, scores.rewards[i]), strict=True)),
            }
            | {name: values[i] for name, values in scores.extra.items()}
            for i, lesson in enumerate(rollouts.lessons)
        ]
        chance = random.Random(f"{self.config.seed}/log/{self.step}").random()
        is_lucky = chance < self.trainer.logging_prob
        shown = len(rows) if is_lucky else self.shown_completions(len(rows))
        self.loop.progress.completions(self.step, rows[:shown])
        self.loop.progress.lessons(self.step, [r for r in rows if r["outcome"] != "unchanged"])

    def state(self) -> dict:
        """Also what the student has been asked ahead; with it, a resumed run repeats this one even
        where the student's engines would say something else the second time."""
        attempts = dict(self.recorded)  # what the run has not come to yet
        for key, pending in self.prefetched.items():
            # A run that stops for want of a student leaves out what that has not answered; the
            # resumed one asks again.
            with suppress(EngineError):
                attempts[key] = pending.record()
        return super().state() | {"student": student_settings(self.config), "attempts": attempts}

    def _restore(self, saved: dict) -> None:
        super()._restore(saved)
        if saved.get("student") == student_settings(self.config):
            self.recorded = saved["attempts"]

    def boundary(self) -> Callable[[], None]:
        go_back = super().boundary()
        prefetched, recorded = dict(self.prefetched), dict(self.recorded)

        def go_back_with_attempts() -> None:
            go_back()
            self.prefetched, self.recorded = prefetched, recorded

        return go_back_with_attempts

    def run_ended(self) -> None:
        if self.loop.progress:
            self.loop.say(f"report: {write_report(self.loop.directory)}")

    def rest(self) -> None:
        self.student.close()
        if self.judge:
            self.judge.rest()


def _as_json(reward: Tensor) -> float | None:
    return None if reward.isnan() else reward.item()


def student_settings(config: TeacherGRPOConfig) -> dict:
    """All that the student's attempts depend on beside the questions, as JSON."""
    names = (
        "seed", "baseline_samples", "max_probe_tokens", "max_answer_tokens", "student_temperature",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    return settings | {"student": asdict(config.student), "templates": asdict(config.templates)}
