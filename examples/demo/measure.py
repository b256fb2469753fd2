"""What the demo's teacher learned, measured on the exported model and against two controls.

Teacher (before and after) and student answer from their engines, without a trainer, on held-out
problems; every figure is an accuracy of the student, 0 to 1.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from examples.demo.problems import CONSTANT_HINTS, teaching_text
from grpo_mcore.checkpoint.stored import StoredModel
from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.data.questions import Question, load_questions
from grpo_mcore.preflight.teaching_job import check_job
from grpo_mcore.teaching.classroom import Classroom
from grpo_mcore.teaching.lesson import Attempt, Lesson, summarise
from grpo_mcore.trainers.tutor import open_engines


def measure(config: TeacherGRPOConfig, trained: Path, unseen: Path) -> dict:
    """The figures of result.json that describe the teacher in `trained`, in this one process.

    Args:
        config: the finished run's settings; `config.teacher` is the teacher before training.
        unseen: problems in wordings that neither model met.
    """
    config, job = check_job(config, world_size=1)
    data = config.data
    with open_engines(config, job) as engines:
        room = Classroom(engines.student, engines.generate, job.tokenizers["teacher"], config)
        sets = {
            "held_out": job.eval,
            "unseen": load_questions(data, "unseen_wordings", str(unseen), "test"),
        }
        attempts = {name: _attempts(room, questions, name) for name, questions in sets.items()}
        engines.hold(StoredModel(config.teacher.path), 0)
        before = {name: _taught(room, held, name) for name, held in attempts.items()}
        engines.hold(StoredModel(str(trained)), 1)
        after = {name: _taught(room, held, name) for name, held in attempts.items()}
        held_out = attempts["held_out"]
        hint, constant = _best_constant(room, held_out)
        shuffled = _shuffled(room, held_out, after["held_out"].lessons, config.seed)

    def accuracies(name: str) -> dict:
        was, now = before[name], after[name]
        return {
            "student_alone": now.sampled["baseline_accuracy"],
            "taught_before": was.sampled["student_accuracy"],
            "taught_after": now.sampled["student_accuracy"],
            "taught_before_greedy": was.greedy["student_accuracy"],
            "taught_after_greedy": now.greedy["student_accuracy"],
            "non_degradation_before": was.sampled["non_degradation"],
            "non_degradation": now.sampled["non_degradation"],
            "non_degradation_greedy": now.greedy["non_degradation"],
            "teaching_tokens_before": was.sampled["teaching_length_mean"],
            "teaching_tokens": now.sampled["teaching_length_mean"],
            "problems": len(attempts[name]),
        }

    unseen_figures = accuracies("unseen")
    return accuracies("held_out") | {
        "constant_guidance": constant,
        "constant_guidance_hint": hint,
        "shuffled_guidance": shuffled,
        "unseen_wordings": unseen_figures["taught_after"],
        "unseen_wordings_figures": unseen_figures,
    }


@dataclass(frozen=True)
class _Taught:
    sampled: dict
    greedy: dict
    lessons: list[Lesson]


def _attempts(room: Classroom, questions: list[Question], key: str) -> list[Attempt]:
    attempts, _ = room.ask_attempts(questions, key).result()
    return attempts


def _taught(room: Classroom, attempts: list[Attempt], key: str) -> _Taught:
    lessons = room.evaluate(attempts, key)
    return _Taught(summarise(lessons["sampled"]), summarise(lessons["greedy"]), lessons["sampled"])


def _best_constant(room: Classroom, attempts: list[Attempt]) -> tuple[str, float]:
    """The single hint that helps most when given to everybody, and what it gives."""
    scores = {}
    for hint in CONSTANT_HINTS:
        lessons = room.teach(attempts, [teaching_text(hint)] * len(attempts), "constant")
        scores[hint] = summarise(lessons)["student_accuracy"]
    best = max(scores, key=scores.get)
    return best, scores[best]


def _shuffled(room: Classroom, attempts: list[Attempt], lessons: list[Lesson], seed: int) -> float:
    """The learned hints, each dealt to another question."""
    order = list(range(len(lessons)))
    random.Random(seed).shuffle(order)
    texts = [""] * len(order)
    for giver, taker in zip(order, order[1:] + order[:1], strict=True):
        texts[taker] = lessons[giver].guidance
    return summarise(room.teach(attempts, texts, "shuffled"))["student_accuracy"]
