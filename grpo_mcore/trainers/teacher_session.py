"""What TeacherGRPOTrainer does at each step, on the teacher's ranks and on the student's."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import ModuleList

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.questions import Question
from grpo_mcore.parallel.world import World
from grpo_mcore.report.html import write_report
from grpo_mcore.rewards import RewardSpec, Scores
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.samples import Rollouts, Sample
from grpo_mcore.teaching.classroom import Classroom, PendingAttempts
from grpo_mcore.teaching.lesson import Attempt, Lesson, summarise
from grpo_mcore.teaching.student import LocalStudent, RemoteStudent, Student, serve
from grpo_mcore.teaching.tutoring import Tutoring
from grpo_mcore.trainers.base import Attendance
from grpo_mcore.trainers.grpo_session import GRPOSession
from grpo_mcore.trainers.judges import JudgeLink
from grpo_mcore.trainers.loop import Start

if TYPE_CHECKING:
    from grpo_mcore.trainers.teacher_grpo import TeacherGRPOTrainer

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


def measures_likelihood(specs: Sequence[RewardSpec]) -> bool:
    """Whether a reward wants to know how likely the student finds the right answers."""
    return any(spec.asks_for(LIKELIHOOD_GAINS) for spec in specs)


class StudentAttendance(Attendance):
    """Processes that carry only the student."""

    def __init__(self, student: Student, world: World):
        self.student, self.world, self.answered = student, world, 0
        self.told: Any = None
        """By the teacher's processes, when last served."""

    def serve(self) -> None:
        role, mailbox = self.world.roles["student"], self.world.mailbox
        self.answered, self.told = serve(self.student, role, mailbox, self.answered)


class TeacherSession(GRPOSession):
    """The steps, on the teacher's ranks."""

    def __init__(
        self,
        trainer: "TeacherGRPOTrainer",
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
        super().run_ended()

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
