"""Times the weight sync on random Qwen2-shaped models in bfloat16, and measures what it could take.

    python tools/bench_weight_sync.py [--models 30M 120M 500M] [--layouts 1x1x1 2x1x1 2x2x1]
        [--engine-tp 1 2] [--bucket-megabytes 64] [--repeats 5]
        [--output outputs/bench_weight_sync.json]

Each row is one launch: the trainer in that layout (TPxPPxDP) and one vLLM engine. Of several
syncs the fastest counts, for other processes on the machine only ever add time; so of the rest:

    memcpy       one copy of the same bytes from memory to memory, by one thread of the trainer
    engine       the engine's own load of the same tensors, which it holds in its own memory
    ratio        sync / (memcpy + engine)
    other        the part of a sync in which rank 0 neither copied nor summed, nor waited for the
                 engine or at a barrier: names, messages, comparing checksums
    extra        the peak of memory beyond what trainer and engine held before, in buckets, as the
                 sum of proportional set sizes (pages that several share are counted once); over the
                 first two syncs, of which no time is taken
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from grpo_mcore.rollout.bucket import Delivery, view
from grpo_mcore.rollout.receiver import WeightReceiver

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = {
    "model": "model",
    "layout": "layout",
    "engine_tp": "TP",
    "bytes": "MB",
    "seconds": "sync s",
    "gbytes_per_second": "GB/s",
    "memcpy_seconds": "memcpy s",
    "engine_seconds": "engine s",
    "ratio": "ratio",
    "other": "other %",
    "extra_buckets": "extra",
}


@dataclass
class Row:
    model: str
    layout: str
    engine_tp: int
    parameters: int
    bytes: int
    buckets: int
    bucket_bytes: int
    first_seconds: float
    seconds: float
    gbytes_per_second: float
    gather_seconds: float
    checksum_seconds: float
    wait_seconds: float
    memcpy_seconds: float
    memcpy_gbytes_per_second: float
    engine_seconds: float
    ratio: float
    other: float
    extra_bytes: int
    extra_buckets: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["30M", "120M", "500M"])
    parser.add_argument("--layouts", nargs="+", default=["1x1x1", "2x1x1", "2x2x1"])
    parser.add_argument("--engine-tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bucket-megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/bench_weight_sync.json")
    arguments = parser.parse_args()
    rows = []
    print("".join(f"{title:>10s}" for title in COLUMNS.values()), flush=True)
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as directory:
            writer = [sys.executable, ROOT / "tools/random_model.py", model, directory]
            subprocess.run(writer, check=True)
            for layout in arguments.layouts:
                for engine_tp in arguments.engine_tp:
                    job = {
                        "model": model,
                        "layout": layout,
                        "engine_tp": engine_tp,
                        "directory": directory,
                        "bucket_megabytes": arguments.bucket_megabytes,
                        "repeats": arguments.repeats,
                    }
                    rows.append(launch(job))
                    show(rows[-1])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"cpus": os.cpu_count(), "rows": [asdict(row) for row in rows]}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {arguments.output}")


def launch(job: dict) -> Row:
    processes = 1
    for size in job["layout"].split("x"):
        processes *= int(size)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", __file__),
    ]
    with tempfile.NamedTemporaryFile("r") as answer:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "BENCH_JOB": json.dumps(job | {"answer": answer.name}),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        return Row(**json.load(answer))


def show(row: Row) -> None:
    cells = asdict(row) | {"bytes": f"{row.bytes / 1e6:.0f}", "other": f"{100 * row.other:.1f}"}
    cells = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in cells.items()}
    print("".join(f"{cells[key]!s:>10s}" for key in COLUMNS), flush=True)


class Worker(WeightReceiver):
    """What each of the engine's workers does here beside receiving."""

    def begin_sync(self, delivery: Delivery | None) -> None:
        super().begin_sync(delivery)
        self.kept = {}

    def receive_bucket(self, number: int, place: int) -> None:
        super().receive_bucket(number, place)
        if getattr(self, "keeps", False):
            tensors = view(self.buffers[place], self.delivery.buckets[number])
            self.kept |= {name: tensor.clone() for name, tensor in tensors.items()}

    def keep(self) -> None:
        """Keeps what the next sync brings."""
        self.keeps = True

    def load(self) -> float:
        """Seconds it takes to load what was kept."""
        self.keeps, kept = False, self.kept
        start = time.perf_counter()
        super().begin_sync(None)
        self.model_runner.model.load_weights(kept.items())
        super().end_sync()
        return time.perf_counter() - start


def work(job: dict) -> None:
    """One rank's part of a measurement; rank 0 writes the row."""
    from grpo_mcore.config import ModelConfig, RolloutConfig
    from grpo_mcore.models.build import load_model
    from grpo_mcore.models.families import read_shape
    from grpo_mcore.parallel.grid import Layout
    from grpo_mcore.parallel.world import join
    from grpo_mcore.rollout.pool import RolloutPool
    from grpo_mcore.rollout.spec import EngineSpec
    from grpo_mcore.weights import sync as sync_module

    torch.set_num_threads(1)
    layout = Layout.parse("layout", job["layout"])
    with join({"policy": layout}, "colocated", 600) as world, tempfile.TemporaryDirectory() as logs:
        role, path = world.roles["policy"], job["directory"]
        shape = read_shape("model.path", path)
        engine = RolloutConfig(kv_cache_gib=0.05, deadline_seconds=600)
        extension = "tools.bench_weight_sync.Worker"
        spec = EngineSpec(path, "bfloat16", 128, [0], job["engine_tp"], worker_extension=extension)
        pool = RolloutPool(role, spec, 1, engine, Path(logs))
        model = ModelConfig(path=path, dtype="bfloat16")
        chunks = load_model(shape, model, role, 0).requires_grad_(False)
        pool.wait_until_ready()
        sync = sync_module.WeightSync(chunks, shape, role, pool, job["bucket_megabytes"])
        processes = role.all_gather(os.getpid())
        if pool.engine:
            guard = psutil.Process(pool.engine.process.pid)
            processes += [guard.pid, *(p.pid for p in guard.children(recursive=True))]
        version = 0

        def push() -> float:
            nonlocal version
            version += 1
            role.all_gather(None)
            start = time.perf_counter()
            nonlocal moved
            moved = sync.push(version)
            return time.perf_counter() - start

        moved: dict[str, int] = {}
        with peak_memory(set(processes) if role.rank == 0 else set()) as extra:
            first = push()
            push()
        times = []
        for _ in range(job["repeats"]):
            with phases(sync_module) as spent:
                times.append((push(), dict(spent)))
        seconds, spent = min(times, key=lambda pair: pair[0])
        if pool.engine:
            pool.engine.call("ask_workers", "keep")
        push()
        if role.rank == 0:
            loads = [pool.engine.call("ask_workers", "load") for _ in range(job["repeats"])]
            engine_seconds = min(max(workers) for workers in loads)
            memcpy = copy_seconds(moved["bytes"], job["repeats"])
            row = Row(
                model=job["model"],
                layout=job["layout"],
                engine_tp=job["engine_tp"],
                parameters=moved["bytes"] // 2,
                bytes=moved["bytes"],
                buckets=len(sync.buckets),
                bucket_bytes=sync.size,
                first_seconds=first,
                seconds=seconds,
                gbytes_per_second=moved["bytes"] / seconds / 1e9,
                gather_seconds=spent["gather"],
                checksum_seconds=spent["checksum"],
                wait_seconds=spent["wait"],
                memcpy_seconds=memcpy,
                memcpy_gbytes_per_second=moved["bytes"] / memcpy / 1e9,
                engine_seconds=engine_seconds,
                ratio=seconds / (memcpy + engine_seconds),
                other=1 - sum(spent.values()) / seconds,
                extra_bytes=extra["bytes"],
                extra_buckets=extra["bytes"] / sync.size,
            )
            Path(job["answer"]).write_text(json.dumps(asdict(row)))
        role.all_gather(None)
        pool.close()


@contextmanager
def phases(sync_module):
    """Seconds that the trainer spends in the parts of the syncs within."""
    spent = {"gather": 0.0, "checksum": 0.0, "wait": 0.0}
    inside = []

    def timed(name, function):
        def run(*arguments):
            start = time.perf_counter()
            inside.append(name)
            try:
                return function(*arguments)
            finally:
                inside.pop()
                if not inside:  # ranks that gather wait for each other; that is gathering
                    spent[name] += time.perf_counter() - start

        return run

    owners = [
        ("gather", sync_module.Gather, "write"),
        ("checksum", sync_module, "checksums"),
        ("wait", sync_module._Link, "settle"),
        ("wait", sync_module.dist, "barrier"),
    ]
    originals = [getattr(owner, name) for _, owner, name in owners]
    for (phase, owner, name), original in zip(owners, originals, strict=True):
        setattr(owner, name, timed(phase, original))
    try:
        yield spent
    finally:
        for (_, owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


@contextmanager
def peak_memory(processes: set[int]):
    """The most bytes that `processes` take together within, beyond what they take at first."""
    extra, over = {"bytes": 0}, threading.Event()
    watched = [psutil.Process(process) for process in processes]

    def total() -> int:
        return sum(process.memory_full_info().pss for process in watched)

    before = total()

    def watch() -> None:
        while not over.wait(0.01):
            extra["bytes"] = max(extra["bytes"], total() - before)

    thread = threading.Thread(target=watch)
    if watched:
        thread.start()
    try:
        yield extra
    finally:
        over.set()
        if watched:
            thread.join()


def copy_seconds(size: int, repeats: int) -> float:
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    work(json.loads(os.environ["BENCH_JOB"])) if "BENCH_JOB" in os.environ else main()
