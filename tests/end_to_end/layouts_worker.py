"""One training step at all layouts of up to so many processes, in one launch.

    torchrun --nproc-per-node 8 layouts_worker.py OUTPUT OVERRIDES...

For each layout the first ranks form a world of its size. Engines are started once and given each
layout's weights. Rank 0 writes what it found to OUTPUT/NAME.pt.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from grpo_mcore.checkpoint.start import ANEW
from grpo_mcore.config import LayoutConfig
from grpo_mcore.config.compose import compose_config
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.world import join
from grpo_mcore.rollout.requests import Request
from grpo_mcore.steps.grpo_step import GRPOSession
from grpo_mcore.steps.teaching_engines import ready_student, start_role_engines
from grpo_mcore.steps.teaching_sampler import TeachingSampler
from grpo_mcore.trainers.teacher_grpo import TeacherGRPOTrainer
from grpo_mcore.weights.export import export_model
from grpo_mcore.weights.gather import stream_tensors

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "1x1x1": ("1x1x1", 1, False),
    "2x1x1": ("2x1x1", 1, False),
    "1x2x1": ("1x2x1", 1, False),
    "1x1x2": ("1x1x2", 1, False),
    "2x2x1": ("2x2x1", 1, False),
    "2x2x2": ("2x2x2", 1, False),
    "2x2x2 sequence parallel": ("2x2x2", 1, True),
    "2x1x2 sequence parallel": ("2x1x2", 1, True),
    "1x1x2 two engines": ("1x1x2", 2, False),
}
"""Name -> teacher's layout, its engines, sequence parallelism."""
TRAINED = "2x2x1"
"""The case that goes on for `STEPS` steps and is exported."""
STEPS = 3


def text_reward(prompts, completions, **_) -> list[float]:
    """Something that differs between samples of a random model."""
    return [float(sum(map(ord, text)) % 11) for text in completions]


def main() -> None:
    output, overrides = Path(sys.argv[1]), sys.argv[2:]
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Below the ports that the system gives to connections, of which there are many here.
    port = 10000 + int(os.environ["MASTER_PORT"]) % 20000
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each small world has its own store
    shared = {}
    for number, (name, (layout, engines, sequence_parallel)) in enumerate(CASES.items(), 1):
        size = size_of(name)
        if size > processes:
            continue
        if rank < size:
            os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(port + number)}
            config = compose_config(
                ROOT / "examples/configs",
                "demo",
                [o for o in overrides if not o.startswith("experiment=")],
            )
            config = replace(
                config,
                output_dir=str(output / name.replace(" ", "_")),
                layout=LayoutConfig("colocated", layout, f"1x1x{size}"),
                teacher=replace(config.teacher, sequence_parallel=sequence_parallel),
                rollout=replace(config.rollout, teacher_engines=engines),
                max_steps=STEPS,
                max_grad_norm=1e9,  # gradients are compared as they are
            )
            run_case(name, config, shared, output)
        wait_for(output / f"{name}.pt")
    for pool in shared.values():
        pool.close()


def size_of(name: str) -> int:
    """Processes that the case needs."""
    return Layout.parse("layout", CASES[name][0]).size


def run_case(name: str, config, shared: dict, output: Path) -> None:
    trainer = TeacherGRPOTrainer(config, text_reward)
    config, job = trainer.args, trainer.job
    with join(job.layouts, job.placement, 240) as world:
        pools = {n: pool_for(role, config, job, shared) for n, role in world.roles.items()}
        student = ready_student(world.roles["student"], pools["student"], config, job)
        teacher = world.roles["teacher"]
        loop = trainer._steps(
            teacher,
            pools["teacher"],
            ANEW,
            lambda *parts: TeachingSampler(job, config, teacher, *parts, student),
        )
        metrics = loop.train_step(0)
        plan = loop.engines.sync.plan
        streams = stream_tensors(
            loop.policy.chunks, loop.shape, plan, teacher, lambda p: p.main_grad
        )
        gradients = {k: v.clone() for tensors in streams for k, v in tensors.items()}
        found = {"metrics": metrics, "gradients": gradients}
        if name == TRAINED:
            found |= train_on(loop, config, output / "exported")
        for unused in loop.sampler.prefetched.values():
            unused.result()
        loop.loop.close()
        if job.engines["teacher"] > 1:
            pools["teacher"].close()
        if teacher.rank == 0:
            torch.save(found, output / f"{name}.partial")
            (output / f"{name}.partial").rename(output / f"{name}.pt")


def pool_for(role, config, job, shared: dict):
    """The role's engines: those of earlier layouts, where rank 0 has one already."""
    if job.engines[role.name] == 1 and role.rank == 0 and role.name in shared:
        shared[role.name].role, shared[role.name].versions = role, [-1]
        return shared[role.name]
    pool = start_role_engines(role, config, job)
    if job.engines[role.name] == 1 and role.rank == 0:
        shared[role.name] = pool
    return pool


def train_on(loop: GRPOSession, config, exported: Path) -> dict:
    """More steps; what both engines say before and after, and the exported teacher."""

    classroom, questions = loop.sampler.classroom, loop.job.train[:4]

    def student_texts() -> list[str]:
        attempts, _ = classroom.ask_attempts(questions, "check").result()
        return [text for a in attempts for text in (*a.baselines, a.approach)]

    before = student_texts()
    attempts, _ = classroom.ask_attempts(questions, "check").result()
    prompts = [classroom.adaptive_prompt(a) for a in attempts]
    for step in range(1, STEPS):
        loop.train_step(step)
    greedy = loop.engines.pool.generate([Request(p, 12, 0, temperature=0.0) for p in prompts])
    export_model(loop.policy.chunks, loop.shape, loop.role, exported, config.teacher.path)
    return {
        "student_before": before,
        "student_after": student_texts(),
        "prompts": prompts,
        "greedy": [completion.tokens for completion in greedy],
    }


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.1)


if __name__ == "__main__":
    main()
