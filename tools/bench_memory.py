"""Measures the memory of training beside what grpo_mcore.memory predicts of it, on a CPU.

    python tools/bench_memory.py [--models 30M 120M 300M] [--layouts 1x1x1] [--rows 4]
        [--length 256] [--dtype float32] [--distributed-optimizer] [--recompute full]
        [--sequence-parallel] [--without-engine] [--output outputs/bench_memory.json]

Each row is one launch: two updates of a random Qwen2-shaped model with a reference model, in that
layout (TPxPPxDP), and a vLLM engine that is given its weights. A phase's memory is the peak of
resident memory in it (that of "init" what is held at its end, as the peak has the checkpoint's
mapped pages), of the rank with the most, over what the same process held after a run with a model
of a few hundred parameters: libraries, thread pools and buffers of the communication.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
TINY = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512,
    "max_position_embeddings": 512,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["30M", "120M", "300M"])
    parser.add_argument("--layouts", nargs="+", default=["1x1x1"])
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recompute")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--without-engine", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/bench_memory.json")
    arguments = parser.parse_args()
    options = vars(arguments).copy()
    output, models, layouts = (options.pop(n) for n in ("output", "models", "layouts"))
    rows = []
    print(f"{'model':8s}{'layout':8s}{'phase':12s}{'predicted':>12s}{'measured':>12s}{'error':>9s}")
    for model in models:
        with tempfile.TemporaryDirectory() as directory:
            writer = [sys.executable, ROOT / "tools/random_model.py", model, directory]
            subprocess.run(writer, check=True)
            for layout in layouts:
                row = {"model": model, "layout": layout, **options}
                row |= measure(directory, layout, **options)
                rows.append(row)
                show(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"written: {output}")


def measure(directory: str, layout: str, **options) -> dict[str, dict[str, int]]:
    """Bytes by phase, predicted and measured, of the model in `directory`."""
    processes = 1
    for size in layout.split("x"):
        processes *= int(size)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", __file__),
    ]
    with tempfile.TemporaryDirectory() as work:
        answer = Path(work) / "answer.json"
        write_tiny(Path(work) / "tiny")
        job = {
            "directory": directory, "layout": layout, "tiny": str(Path(work) / "tiny"),
            "answer": str(answer), **options,
        }  # fmt: skip
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "BENCH_JOB": json.dumps(job),
            # Freed memory goes back to the system, so that a peak is of what is in use.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 17),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
            "MALLOC_ARENA_MAX": "2",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=work)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return json.loads(answer.read_text())


def show(row: dict) -> None:
    for phase, measured in row["measured"].items():
        predicted = row["predicted"][phase]
        error = predicted / measured - 1
        print(
            f"{row['model']:8s}{row['layout']:8s}{phase:12s}{predicted / MIB:>8.0f} MiB"
            f"{measured / MIB:>8.0f} MiB{100 * error:>+8.1f} %",
            flush=True,
        )


def work(job: dict) -> None:
    """One rank's part of a measurement; rank 0 writes the answer."""
    import torch

    from grpo_mcore.config import GRPOConfig, ModelConfig, RolloutConfig
    from grpo_mcore.memory.devices import GIB
    from grpo_mcore.memory.engines import engine_weights
    from grpo_mcore.memory.job import rank_phases
    from grpo_mcore.models.families import read_shape, shape_of
    from grpo_mcore.parallel.grid import Layout
    from grpo_mcore.parallel.world import join

    torch.set_num_threads(1)
    layout, path = Layout.parse("layout", job["layout"]), job["directory"]
    config = GRPOConfig(
        model=ModelConfig(
            path, job["dtype"], recompute=job["recompute"],
            sequence_parallel=job["sequence_parallel"],
        ),
        per_device_train_batch_size=job["rows"],
        num_prompts_per_step=layout.data,
        num_generations=job["rows"],
        beta=0.1,
        learning_rate=1e-5,
        max_steps=2,
        gradient_accumulation_steps=1,
        distributed_optimizer=job["distributed_optimizer"],
        rollout=RolloutConfig(kv_cache_gib=0.25, bucket_megabytes=64, deadline_seconds=900),
    )  # fmt: skip
    shape = read_shape("model.path", path)
    with join({"policy": layout}, "colocated", 900) as world:
        role = world.roles["policy"]
        tiny = Path(job["tiny"])
        steps = Steps(role, config, tiny, shape_of(TINY, "tiny"))
        for phase in (steps.init, steps.log_probs, steps.update):
            phase(job["rows"], 64)
        del steps
        before = resident("VmRSS")
        steps = Steps(role, config, Path(path), shape)
        measured = {}
        for phase in (steps.init, *(2 * [steps.log_probs, steps.update])):
            Path("/proc/self/clear_refs").write_text("5")
            phase(job["rows"], job["length"])
            field = "VmRSS" if phase == steps.init else "VmHWM"
            measured[phase.__name__.replace("_", "-")] = resident(field) - before
        if not job["without_engine"]:
            measured |= steps.engine(tiny, before)
        predicted = rank_phases(config, config.model, shape, layout, job["length"], False)
        everyone = role.all_gather(measured)
        if role.rank == 0:
            most = {phase: max(found[phase] for found in everyone) for phase in measured}
            predicted["engine"] = {
                "engine weights": engine_weights(shape, job["dtype"], 1, None, on_cpu=True),
                "KV cache": int(config.rollout.kv_cache_gib * GIB),
            }
            sizes = {phase: sum(found.values()) for phase, found in predicted.items()}
            Path(job["answer"]).write_text(
                json.dumps({"predicted": {p: sizes[p] for p in most}, "measured": most})
            )


class Steps:
    """The phases of a run, one after the other."""

    def __init__(self, role, config, path: Path, shape):
        self.role, self.config, self.path, self.shape = role, config, path, shape

    def init(self, rows: int, length: int) -> None:
        from grpo_mcore.training.policy import Policy, Reference

        model = replace(self.config.model, path=str(self.path))
        self.policy = Policy(self.role, self.shape, model, self.config)
        self.reference = Reference(self.role, self.shape, model, self.config)

    def log_probs(self, rows: int, length: int) -> None:
        self.batch = self.make_batch(rows, length)
        self.batch["reference"] = self.reference.log_probs(self.batch, 1.0)

    def update(self, rows: int, length: int) -> None:
        from grpo_mcore.data.order import GenerationCycle
        from grpo_mcore.steps.update import GRPOUpdate

        update = GRPOUpdate(self.policy, self.reference, self.config, GenerationCycle(1, 1, 1))
        update(dict(self.batch))

    def make_batch(self, rows: int, length: int) -> dict:
        import torch

        rows *= self.role.layout.data
        mask = torch.ones(rows, length)
        mask[:, -1] = 0
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.shape.vocab, (rows, length), generator=generator)
        return {
            "tokens": tokens,
            "mask": mask,
            "lengths": torch.full((rows,), length),
            "rollout": torch.zeros(rows, length),
            "advantages": torch.ones(rows),
            "tokens_per_update": torch.full((rows,), float(mask.sum()), dtype=torch.double),
        }

    def engine(self, tiny: Path, before: int) -> dict[str, int]:
        """Bytes of the sync and of the engine, whose own start is that of an engine of the model in
        `tiny`."""
        from grpo_mcore.weights.sync import WeightSync

        empty = self.start(tiny)
        bare = 0
        if empty.engine:
            bare = largest_child(empty) - int(self.config.rollout.kv_cache_gib * (1 << 30))
        empty.close()
        pool = self.start(self.path)
        sync = WeightSync(self.policy.chunks, self.shape, self.role, pool, 64)
        Path("/proc/self/clear_refs").write_text("5")
        sync.push(1)
        sync.push(2)
        found = {"sync": resident("VmHWM") - before, "engine": 0}
        if pool.engine:
            found["engine"] = largest_child(pool) - bare
        pool.close()
        return found

    def start(self, path: Path):
        from grpo_mcore.rollout.pool import RolloutPool
        from grpo_mcore.rollout.spec import EngineSpec

        spec = EngineSpec(str(path), self.config.model.dtype, 512, [0])
        logs = Path(tempfile.mkdtemp())
        pool = RolloutPool(self.role, spec, 1, self.config.rollout, logs)
        pool.wait_until_ready()
        return pool


def write_tiny(directory: Path) -> None:
    """A model of a few hundred thousand parameters."""
    import torch
    import transformers

    config = transformers.Qwen2Config(**TINY, tie_word_embeddings=False, dtype=torch.float32)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def resident(field: str, pid: int | str = "self") -> int:
    """Bytes of `field` of a process's status: "VmRSS", or "VmHWM", its peak."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def largest_child(pool) -> int:
    """Bytes of memory of its own that the largest process of this rank's engine holds."""
    guard = psutil.Process(pool.engine.process.pid)
    return max(p.memory_full_info().uss for p in guard.children(recursive=True))


if __name__ == "__main__":
    if "BENCH_JOB" in os.environ:
        work(json.loads(os.environ["BENCH_JOB"]))
    else:
        main()
