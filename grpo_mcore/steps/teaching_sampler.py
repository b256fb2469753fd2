"""Samples of teaching: guidances for a dataset's questions, and what the student makes of them."""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import time
from typing import ClassVar

from torch import Tensor

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.questions import Question
from grpo_mcore.parallel.groups import Role
from grpo_mcore.preflight.teaching_job import TeachingJob, read_questions
from grpo_mcore.report.html import write_report
from grpo_mcore.report.progress import Progress
from grpo_mcore.rewards import Scores
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.samples import Rollouts, Sample
from grpo_mcore.steps.policy_engines import PolicyEngines
from grpo_mcore.steps.sampler import Sampler, recorded
from grpo_mcore.steps.scoring import Scoring
from grpo_mcore.steps.side_roles import JudgeLink
from grpo_mcore.teaching.classroom import Classroom, PendingAttempts
from grpo_mcore.teaching.lesson import LESSON_COLUMNS, Attempt, measures_likelihood, summarise
from grpo_mcore.teaching.student import Asker
from grpo_mcore.teaching.tutoring import Tutoring

SETTINGS = (
    "seed", "baseline_samples", "max_probe_tokens", "max_answer_tokens", "student_temperature",
)  # fmt: skip
"""All that the student's attempts depend on beside the questions, its model and the templates."""


class TeachingSampler(Sampler):
    """The teacher's guidances, each with the lesson it makes.

    Attributes:
        classroom: asks teacher and student.
        tutoring: diagnoses and guides, one task at a time.
    """

    shown: ClassVar[dict[str, str]] = {
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

    def __init__(
        self,
        job: TeachingJob,
        config: TeacherGRPOConfig,
        role: Role,
        engines: PolicyEngines,
        scoring: Scoring,
        student: Asker,
        judge: JudgeLink | None = None,
        logging_prob: float = 0.0,
    ):
        """
        Args:
            logging_prob: the probability with which all of a step's guidances are recorded.
        """
        self.job, self.config, self.role, self.phases = job, config, role, engines.phases
        self.rewards, self.student, self.judge = scoring.rewards, student, judge
        self.logging_prob, self.evaluates = logging_prob, bool(job.eval)
        tokenizer = job.tokenizer
        self.classroom = Classroom(
            student, engines.generate, tokenizer, config, measures_likelihood(self.rewards)
        )
        self.tutoring = Tutoring(
            student, engines.generate, job.tokenizers, config, vars(job.lengths)
        )
        self.prefetched: dict[str, PendingAttempts] = {}
        self.recorded: dict[str, dict] = {}
        """Attempts of the checkpoint that the run has not come to yet."""
        self.training_span = (0.0, 0.0)
        """From when to when the trainer last trained (seconds since the epoch)."""

    def roll_out(self, numbers: list[int], key: str) -> Rollouts:
        with self.phases("attempts"):
            attempts = self._attempts_of(self._questions(numbers), key)
        return self._teach(attempts, key)

    def roll_out_given(self, rows: Sequence[dict]) -> Rollouts:
        likelihood = self.classroom.measures_likelihood
        questions = read_questions(self.config, self.job, list(rows), likelihood)
        attempts, _ = self.classroom.ask_attempts(questions, "asked").result()
        return self._teach(attempts, "asked")

    def look_ahead(self, numbers: list[int], key: str) -> None:
        """Asks the student for the next attempts without waiting. They do not depend on the
        teacher, so the student makes them while the teacher trains."""
        self._ask_attempts(self._questions(numbers), key)
        self.training_span = (time(), 0.0)

    def describe(self, rollouts: Rollouts, metrics: dict[str, float]) -> dict[str, float]:
        lessons = rollouts.lessons
        found = self.role.once(lambda: summarise(lessons))  # math may take its time limit
        tokenizer = self.job.tokenizer
        approaches = [tokenizer.encode(lesson.attempt.approach) for lesson in lessons]
        found["student_approach_length"] = fmean(map(len, approaches))
        if "reward" in metrics and found["teaching_length_mean"]:
            hundreds = found["teaching_length_mean"] / 100
            found["token_efficiency"] = metrics["reward"] / hundreds
        return found

    def evaluate(self, datasets: dict[str, list[Question]] | None, step: int) -> dict[str, float]:
        """Teaches the held-out questions. The student is frozen, so it attempts them once."""
        metrics = {}
        for name, questions in (datasets or {"eval": self.job.eval}).items():
            own = datasets is None  # which are asked again and again
            ask = self._ask_attempts if own else self.classroom.ask_attempts
            attempts, _ = ask(questions, name).result()
            for way, lessons in self.classroom.evaluate(attempts, name).items():
                found = self.role.once(lambda lessons=lessons: summarise(lessons))
                metrics |= {f"{way}_{metric}": value for metric, value in found.items()}
        return metrics

    def record(
        self, progress: Progress, step: int, rollouts: Rollouts, scores: Scores, rewards: Tensor
    ) -> None:
        """Some of the lessons, and all that changed what the student can do."""
        names = [spec.name for spec in self.rewards]
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
        chance = random.Random(f"{self.config.seed}/log/{step}").random()
        is_lucky = chance < self.logging_prob
        shown = len(rows) if is_lucky else recorded(self.config, len(rows))
        progress.completions(step, rows[:shown])
        progress.lessons(step, [row for row in rows if row["outcome"] != "unchanged"])

    def step_ended(self, metrics: dict[str, float]) -> dict[str, float]:
        self.training_span = (self.training_span[0], time())
        if seconds := metrics.get("time/student_attempts"):
            hidden = metrics["time/student_attempts_during_training"]
            return {"time/student_hidden_share": hidden / seconds}
        return {}

    def state(self) -> dict:
        """Also what the student has been asked ahead; with it, a resumed run repeats this one even
        where the student's engines would say something else the second time."""
        attempts = dict(self.recorded)
        for key, pending in self.prefetched.items():
            # A run that stops for want of a student leaves out what that has not answered; the
            # resumed one asks again.
            with suppress(EngineError):
                attempts[key] = pending.record()
        return {"student": self._student_settings(), "attempts": attempts}

    def restore(self, saved: dict) -> None:
        if saved.get("student") == self._student_settings():
            self.recorded = saved["attempts"]

    def boundary(self) -> Callable[[], None]:
        prefetched, recorded = dict(self.prefetched), dict(self.recorded)

        def go_back() -> None:
            self.prefetched, self.recorded = prefetched, recorded

        return go_back

    def run_ended(self, directory: Path) -> str:
        return f"report: {write_report(directory)}"

    def rest(self) -> None:
        self.student.close()
        if self.judge:
            self.judge.rest()

    def _questions(self, numbers: list[int]) -> list[Question]:
        return [self.job.train[number] for number in numbers]

    def _teach(self, attempts: list[Attempt], key: str) -> Rollouts:
        phases, config, classroom = self.phases, self.config, self.classroom
        with phases("guidance"):
            guidance = classroom.guide(attempts, key, config.num_generations, config.temperature)
        with phases("taught"):
            lessons = classroom.teach(attempts, classroom.texts(guidance), key)
        self._add_seconds("student_likelihoods", classroom.scoring_seconds)
        questions = [lesson.attempt.question for lesson in lessons]
        names = questions[0].columns.keys() - {"prompts", "completions"}
        columns = {name: [q.columns[name] for q in questions] for name in names}
        columns |= {
            name: [read(lesson) for lesson in lessons] for name, read in LESSON_COLUMNS.items()
        }
        return Rollouts(
            [Sample.of(g.prompt, g.completion) for g in guidance],
            [self.job.tokenizer.decode(g.prompt) for g in guidance],
            [lesson.guidance for lesson in lessons],
            columns,
            lessons,
        )

    def _ask_attempts(self, questions: list[Question], key: str) -> PendingAttempts:
        """The attempts under `key`: already asked for, in the checkpoint, or asked for now."""
        if key not in self.prefetched:
            record = self.recorded.pop(key, None)
            recalled = self.classroom.recall_attempts(questions, record) if record else None
            self.prefetched[key] = recalled or self.classroom.ask_attempts(questions, key)
        return self.prefetched[key]

    def _attempts_of(self, questions: list[Question], key: str) -> list[Attempt]:
        """The attempts under `key`, and how much of the student's time training has hidden."""
        self._ask_attempts(questions, key)
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

    def _student_settings(self) -> dict:
        """All that attempts depend on beside the questions, as JSON."""
        config = self.config
        settings = {name: getattr(config, name) for name in SETTINGS}
        return settings | {
            "student": asdict(config.student), "templates": asdict(config.templates)
        }  # fmt: skip


def _as_json(reward: Tensor) -> float | None:
    return None if reward.isnan() else reward.item()
