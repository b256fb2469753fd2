"""Adaptive teaching in two passes: GRPO trains a teacher on how much it helps a frozen student.

The student answers and sketches an approach; the teacher, shown both question and approach, writes
guidance; the student answers again; the reward is the improvement. The loss is conditioned on the
adaptive prompt the guidance was sampled from, not on the bare question.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from grpo_mcore import device
from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.questions import Question, questions_of_step
from grpo_mcore.data.text import extract_solution
from grpo_mcore.models.build import load_model
from grpo_mcore.objectives.advantages import groups_without_spread, sum_rewards
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import World, join, world_size
from grpo_mcore.report.phases import Phases
from grpo_mcore.rewards import (
    AdaptiveTeachingReward,
    RewardCall,
    RewardSource,
    Scores,
    as_reward_specs,
    reward_metrics,
    score,
)
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.teaching.classroom import Classroom, Guidance, PendingAttempts
from grpo_mcore.teaching.lesson import Attempt, Lesson, summarise
from grpo_mcore.teaching.student import LocalStudent, RemoteStudent, Student, serve
from grpo_mcore.trainers.base import ANEW, Loop, Start, choose_start
from grpo_mcore.trainers.grpo_update import GRPOUpdate
from grpo_mcore.trainers.preflight import Job, check_job
from grpo_mcore.training.policy import Policy, Reference, release
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.sync import WeightSync

SHOWN = {
    "reward": "reward {:+.3f}",
    "baseline_accuracy": "alone {:.2f}",
    "student_accuracy": "taught {:.2f}",
    "kl": "kl {:.4f}",
    "grad_norm": "grad {:.2f}",
    "sampling/mismatch": "mismatch {:.6f}",
    "time/step": "{:.1f} s",
    "eval_sampled_baseline_accuracy": "alone {:.3f}",
    "eval_sampled_student_accuracy": "taught {:.3f}",
    "eval_greedy_student_accuracy": "(greedy {:.3f})",
    "eval_sampled_non_degradation": "kept {:.3f}",
    "eval_sampled_teaching_length_mean": "tokens {:.1f}",
}
LESSON_COLUMNS: dict[str, Callable[[Lesson], object]] = {
    "questions": lambda lesson: lesson.attempt.question.text,
    "ground_truths": lambda lesson: lesson.attempt.question.answer,
    "baseline_solutions": lambda lesson: lesson.attempt.solutions,
    "solutions": lambda lesson: extract_solution(lesson.answer),
    "baseline_answers": lambda lesson: lesson.attempt.baselines,
    "answers": lambda lesson: lesson.answer,
    "student_approaches": lambda lesson: lesson.attempt.approach,
    "teachings": lambda lesson: lesson.teaching,
    "teaching_tokens": lambda lesson: lesson.teaching_tokens,
}
"""What reward functions are offered beside the dataset's columns."""
FROZEN = 0
"""The version of the student's weights, for ever."""


class TeacherGRPOTrainer:
    """Trains `args.teacher` to teach `args.student`. The same script runs on every rank; what a
    rank does follows from the layout."""

    def __init__(
        self,
        args: TeacherGRPOConfig,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        reward_processing_classes=None,
    ):
        """Checks everything that can be checked before models load.

        Args:
            reward_funcs: what scores the guidance: functions of any style of `rewards.specs`,
                sequence-classification models or their paths, one or several, weighed by
                `args.reward_weights`. Functions may ask for the dataset's columns and for
                `questions`, `ground_truths`, the student's extracted `baseline_solutions` (a list
                each) and `solutions` and its whole `baseline_answers` and `answers`,
                `student_approaches`, `teachings`, `teaching_tokens`. Default:
                AdaptiveTeachingReward.
            reward_processing_classes: the models' tokenizers, as in TRL.

        Raises:
            ConfigError: for a setting that cannot work.
        """
        self.config = args
        self.job: Job = check_job(args, world_size())
        self.rewards = as_reward_specs(
            reward_funcs
            or AdaptiveTeachingReward(args.degradation_penalty_multiplier, args.efficiency_weight),
            args.reward_weights,
            reward_processing_classes,
            columns={*self.job.train[0].columns, *LESSON_COLUMNS},
        )

    def train(self) -> dict[str, float]:
        """Runs the job to its end and writes the teacher to output_dir/final.

        Returns:
            The last metrics; {} on ranks that only carry the student.
        """
        job, config = self.job, self.config
        deadline = config.rollout.deadline_seconds
        with join(job.layouts, job.placement, deadline) as world, ExitStack() as cleanup:
            if "teacher" in world.roles:
                start = choose_start(config, world.roles["teacher"])
            student = None
            if "student" in world.roles:
                pool = start_engines(world.roles["student"], config, job)
                cleanup.callback(pool.close)
                student = ready_student(world.roles["student"], pool, config, job)
            if "teacher" in world.roles:
                pool = start_engines(world.roles["teacher"], config, job)
                cleanup.callback(pool.close)
                return TeacherLoop(self, world, pool, student, start).run()
            serve(student, world.roles["student"], world.mailbox)
            return {}


def start_engines(role: Role, config: TeacherGRPOConfig, job: Job) -> RolloutPool:
    """Starts the role's engines. On a CPU they load while this process builds its models; on a GPU
    it waits, because vLLM sizes its cache by the device memory it finds free."""
    model = getattr(config, role.name)
    pool = RolloutPool(
        role,
        model.path,
        model.dtype,
        getattr(job.lengths, role.name),
        job.tokenizers[role.name].stop_token_ids(),
        job.engines[role.name],
        getattr(config.rollout, f"{role.name}_tensor_parallel"),
        config.rollout,
        Path(config.output_dir) / "logs",
    )
    if device.is_cuda():
        pool.wait_until_ready()
    return pool


def ready_student(role: Role, pool: RolloutPool, config: TeacherGRPOConfig, job: Job) -> Student:
    """Loads the student's shards in its own layout and hands them to its engines, once."""
    shape = job.shapes["student"]
    chunks = load_model(shape, config.student, role, config.seed)
    pool.wait_until_ready()
    WeightSync(chunks, shape, role, pool, config.rollout.bucket_megabytes).push(FROZEN)
    release(chunks)
    kind = LocalStudent if job.placement == "colocated" else Student
    student = kind(pool, job.tokenizers["student"], config)
    student.rest()
    return student


class TeacherLoop:
    """The steps, on the teacher's ranks."""

    def __init__(
        self,
        trainer: TeacherGRPOTrainer,
        world: World,
        pool: RolloutPool,
        local: LocalStudent | None,
        start: Start = ANEW,
    ):
        self.config, self.job, self.rewards = trainer.config, trainer.job, trainer.rewards
        config, shape = self.config, self.job.shapes["teacher"]
        self.role, self.pool = world.roles["teacher"], pool
        self.tokenizer = self.job.tokenizers["teacher"]
        self.student = local or RemoteStudent(self.role, world.mailbox)
        self.classroom = Classroom(self.student, pool, self.tokenizer, config)
        self.phases = Phases()
        self.prefetched: dict[str, PendingAttempts] = {}
        self.training_span = (0.0, 0.0)

        self.policy = Policy(self.role, shape, config.teacher, config)
        reference = Reference(self.role, shape, config.teacher, config) if config.beta else None
        self.update = GRPOUpdate(self.policy, reference, config)
        self.loop = Loop(config, self.role, self.policy, config.teacher.path, start, SHOWN)
        self.update.entropy.restore(self.loop.restored.get("entropy"))
        self.recorded: dict[str, dict] = {}
        if self.loop.restored.get("student") == student_settings(config):
            self.recorded = self.loop.restored["attempts"]
        pool.wait_until_ready()
        self.sync = WeightSync(
            self.policy.chunks, shape, self.role, pool, config.rollout.bucket_megabytes
        )
        self.sync.push(self.policy.version)

    def run(self) -> dict[str, float]:
        self.loop.say(self.job.describe())
        if self.job.dropped:
            self.loop.say(f"data: {self.job.dropped} questions dropped as too long")
        evaluate = self.evaluate if self.job.eval else None
        metrics = self.loop.run(self.train_step, evaluate, self.state)
        self.student.close()
        final = Path(self.config.output_dir) / "final"
        shape, like = self.job.shapes["teacher"], self.config.teacher.path
        export_model(self.policy.chunks, shape, self.role, final, like)
        self.loop.say(f"trained teacher: {final}")
        self.loop.close()
        return metrics

    def train_step(self, step: int) -> dict[str, float]:
        """One update. Returns its metrics."""
        config, phases = self.config, self.phases
        self.pool.require(self.policy.version)
        with phases("step"):
            with phases("attempts"):
                attempts = self.attempts_of(step)
            with phases("guidance"):
                guidance = self.classroom.guide(
                    attempts, f"step {step}", config.num_generations, config.temperature
                )
            with phases("taught"):
                texts = self.classroom.texts(guidance)
                lessons = self.classroom.teach(attempts, texts, f"step {step}")
            self.prefetch(step + 1)
            training_since = time.time()
            with phases("reward"):
                scores = self.score(step, guidance, lessons)
                batch = self.update.make_batch(
                    [g.prompt for g in guidance], [g.completion for g in guidance]
                )
            with phases("reference"):
                self.update.add_reference(batch)
            with phases("update"):
                metrics = self.update(batch, scores.rewards)
            with phases("sync"):
                sent = self.sync.push(self.policy.version)
        self.training_span = (training_since, time.time())
        rewards = sum_rewards(scores.rewards, config.reward_weights)
        self.log_lessons(step, lessons, rewards)
        return (
            describe(rewards, guidance, config.num_generations)
            | reward_metrics(self.rewards, scores.rewards)
            | {name: sum(values) / len(values) for name, values in scores.metrics.items()}
            | summarise(lessons)
            | metrics
            | {f"sync/{name}": float(value) for name, value in sent.items()}
            | phases.take()
        )

    def prefetch(self, step: int) -> None:
        """Asks the student for the attempts of `step` without waiting. They do not depend on the
        teacher, so the student makes them while the teacher trains."""
        if step < self.config.max_steps:
            config = self.config
            questions = questions_of_step(
                self.job.train, step, config.num_prompts_per_step, config.seed
            )
            self.ask_attempts(questions, f"step {step}")

    def ask_attempts(self, questions: list[Question], key: str) -> PendingAttempts:
        """The attempts under `key`: already asked for, in the checkpoint, or asked for now."""
        if key not in self.prefetched:
            record = self.recorded.pop(key, None)
            recalled = self.classroom.recall_attempts(questions, record) if record else None
            self.prefetched[key] = recalled or self.classroom.ask_attempts(questions, key)
        return self.prefetched[key]

    def state(self) -> dict:
        """For a checkpoint: the entropy bonus's coefficient, and what the student has been asked
        ahead; with it, a resumed run repeats this one even where the student's engines would say
        something else the second time."""
        attempts = {key: pending.record() for key, pending in self.prefetched.items()}
        return {
            "student": student_settings(self.config),
            "attempts": attempts,
            "entropy": self.update.entropy.state(),
        }

    def attempts_of(self, step: int) -> list[Attempt]:
        """The attempts of the step, and how much of the student's time training has hidden."""
        self.prefetch(step)
        attempts, work = self.prefetched.pop(f"step {step}").result()
        since, until = self.training_span
        hidden = max(0.0, min(work.finished, until) - max(work.started, since))
        self.phases.seconds["student_attempts"] = work.finished - work.started
        self.phases.seconds["student_attempts_during_training"] = hidden
        return attempts

    def score(self, step: int, guidance: list[Guidance], lessons: list[Lesson]) -> Scores:
        """Each lesson's rewards, computed once and shared by all ranks."""
        questions = [lesson.attempt.question for lesson in lessons]
        names = questions[0].columns.keys() - {"prompts", "completions"}
        columns = {name: [q.columns[name] for q in questions] for name in names}
        columns |= {
            name: [read(lesson) for lesson in lessons] for name, read in LESSON_COLUMNS.items()
        }
        call = RewardCall(
            step + 1,
            [self.tokenizer.decode(g.prompt) for g in guidance],
            [lesson.guidance for lesson in lessons],
            [g.completion.tokens for g in guidance],
            columns,
        )
        return self.role.once(lambda: score(self.rewards, call, self.config.reward_timeout))

    def evaluate(self) -> dict[str, float]:
        """Teaches the held-out questions. The student is frozen, so it attempts them once."""
        attempts, _ = self.ask_attempts(self.job.eval, "eval").result()
        return self.classroom.evaluate(attempts, "eval")

    def log_lessons(self, step: int, lessons: list[Lesson], rewards: torch.Tensor) -> None:
        if self.loop.progress:
            rows = [
                {
                    "question": lesson.attempt.question.text,
                    "ground_truth": lesson.attempt.question.answer,
                    "approach": lesson.attempt.approach,
                    "baselines": lesson.attempt.baselines,
                    "guidance": lesson.guidance,
                    "answer": lesson.answer,
                    "reward": None if reward.isnan() else reward.item(),
                }
                for lesson, reward in zip(lessons, rewards, strict=True)
            ]
            self.loop.progress.completions(step + 1, rows[: self.config.log_completions])


def student_settings(config: TeacherGRPOConfig) -> dict:
    """All that the student's attempts depend on beside the questions, as JSON."""
    names = (
        "seed", "baseline_samples", "max_probe_tokens", "max_answer_tokens", "student_temperature",
    )  # fmt: skip
    settings = {name: getattr(config, name) for name in names}
    return settings | {"student": asdict(config.student), "templates": asdict(config.templates)}


def describe(
    rewards: torch.Tensor, guidance: list[Guidance], num_generations: int
) -> dict[str, float]:
    """Metrics of a step's samples, under TRL's names. `rewards` are NaN where there is none."""
    scored = rewards[~rewards.isnan()]
    lengths = [len(g.completion.tokens) for g in guidance]
    clipped = sum(not g.completion.finished for g in guidance)
    return {
        "reward": scored.mean().item(),
        "reward_std": scored.std().item(),
        "frac_reward_zero_std": groups_without_spread(rewards, num_generations)
        .float()
        .mean()
        .item(),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": clipped / len(guidance),
    }
