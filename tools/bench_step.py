"""Times the phases of a training step, and shows the job's processes and their memory.

    python tools/bench_step.py [--steps 12] [--output outputs/bench_step.json] [OVERRIDES ...]

Runs the demo's job (its models are made first, where missing) with examples/run_teacher_grpo.sh,
and any overrides, such as layout=auto or per_device_train_batch_size=16, or the `teacher.path` and
`student.path` of larger models (tools/random_model.py). The first two steps are warm-up and left
out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from grpo_mcore.report.progress import read_metrics

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench_step.json")
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        job = [
            "experiment=demo",
            "layout=demo",
            f"max_steps={arguments.steps}",
            "data.eval=null",
            "save_steps=0",
            *arguments.overrides,
            f"output_dir={run}",
        ]
        memory = run_and_watch(job, arguments.processes)
        steps = [r for r in read_metrics(run) if "reward" in r][WARM_UP:]
    phases = {
        name.removeprefix("time/"): summary([step[name] for step in steps])
        for name in steps[0]
        if name.startswith("time/")
    }
    result = {
        "phases": phases,
        "processes": memory,
        "steps": len(steps),
        "overrides": arguments.overrides,
        "cpus": os.cpu_count(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"written: {arguments.output}")


def run_and_watch(job: list[str], processes: int) -> dict:
    """Runs the job. Returns each kind of process with its number and peak memory (proportional set
    size: pages shared by several processes are divided between them). Looking costs time, so only
    the phases' times mean anything."""
    environment = os.environ | {"NPROC_PER_NODE": str(processes), "PYTHON": sys.executable}
    with tempfile.TemporaryFile("w+") as log:
        script = ROOT / "examples" / "run_teacher_grpo.sh"
        process = subprocess.Popen(
            ["bash", script, *job], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        peak: dict[str, dict] = {}
        while process.poll() is None:
            for kind, sizes in sizes_of_tree(process.pid).items():
                entry = peak.setdefault(kind, {"processes": 0, "mib_largest": 0, "mib_sum": 0})
                entry["processes"] = max(entry["processes"], len(sizes))
                entry["mib_largest"] = max(entry["mib_largest"], max(sizes) // MIB)
                entry["mib_sum"] = max(entry["mib_sum"], sum(sizes) // MIB)
            time.sleep(1)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read())
    return peak


def sizes_of_tree(pid: int) -> dict[str, list[int]]:
    """Bytes of the processes under `pid`, by kind, and "all together"."""
    sizes: dict[str, list[int]] = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            command = " ".join(process.cmdline())
            size = process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it ended while we looked
            continue
        sizes.setdefault(kind_of(command), []).append(size)
    sizes["all together"] = [sum(sum(v) for v in sizes.values())]
    return sizes


def kind_of(command: str) -> str:
    if "grpo_mcore.rollout.guard" in command:
        return "guard of an engine"
    if "grpo_mcore.rollout.child" in command:
        return "vLLM engine"
    if "grpo_mcore.cli" in command:
        return "launcher (torchrun agent)"
    if "run_teacher_grpo.sh" in command:
        return "rank (Megatron)"
    return "helper (spawned by Python)"


def summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def show(result: dict) -> None:
    print(f"{'phase':36s}{'median s':>10s}{'min':>10s}{'max':>10s}")
    for name, times in result["phases"].items():
        print(f"{name:36s}" + "".join(f"{times[k]:>10.3f}" for k in ("median", "min", "max")))
    print(f"\n{'process':36s}{'number':>10s}{'MiB each':>10s}{'MiB sum':>10s}")
    for kind, entry in sorted(result["processes"].items(), key=lambda item: item[1]["mib_sum"]):
        numbers = (entry["processes"], entry["mib_largest"], entry["mib_sum"])
        print(f"{kind:36s}" + "".join(f"{n:>10d}" for n in numbers))
    print(f"\n{result['steps']} steps after {WARM_UP} of warm-up, on {result['cpus']} cores")


if __name__ == "__main__":
    main()
