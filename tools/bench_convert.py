"""Times the conversion of a model to Megatron and back, and shows the memory it takes.

    python tools/bench_convert.py [--check] [--repeats 5] [--output outputs/bench_convert.json]

The model has the sizes of Qwen2.5-0.5B and random weights in bfloat16. Each conversion is a process
of its own, timed from when everything is imported; "over bare" is its peak of resident memory,
mapped files included, less what it had then. Beside them, a plain copy of the same bytes. What is
read lies in the page cache; what is written is on disk at the end (fsync).
"""

import argparse
import importlib
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}


def main() -> None:
    if sys.argv[1:2] == ["--measured"]:
        return run_measured(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="convert with --check")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench_convert.json")
    arguments = parser.parse_args()
    check = ["--check", "--force"] if arguments.check else ["--force"]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as directory:
        model, megatron, back = (Path(directory) / name for name in ("model", "megatron", "back"))
        write_random_model(model)
        runs: dict[str, list[dict]] = {"hf_to_megatron": [], "megatron_to_hf": [], "plain copy": []}
        for _ in range(arguments.repeats):
            runs["hf_to_megatron"].append(
                measure("hf_to_megatron", "--hf", model, "--output", megatron, *check)
            )
            runs["megatron_to_hf"].append(
                measure("megatron_to_hf", "--megatron", megatron, "--output", back, *check)
            )
            runs["plain copy"].append({"seconds": time_copy(model, Path(directory) / "copy")})
        size = (model / "model.safetensors").stat().st_size
    result = {"model_mib": size // MIB, "check": arguments.check, "cpus": os.cpu_count()}
    arguments.output.write_text(json.dumps(result | {"runs": runs}, indent=2) + "\n")
    show(result, runs)
    print(f"written: {arguments.output}")


def write_random_model(directory: Path) -> None:
    """A Hugging Face directory of the model CONFIG describes; it has no tokenizer."""
    import torch

    from grpo_mcore.models.expected import hf_sizes
    from grpo_mcore.models.families import read_shape
    from grpo_mcore.models.hf_files import write_model

    with tempfile.TemporaryDirectory() as like:
        (Path(like) / "config.json").write_text(json.dumps(CONFIG))
        expected = {
            name: torch.empty(size, dtype=torch.bfloat16, device="meta")
            for name, size in hf_sizes(read_shape("CONFIG", like)).items()
        }
        generator = torch.Generator().manual_seed(0)
        tensors = (
            (name, torch.empty(tensor.shape).normal_(0, 0.02, generator=generator))
            for name, tensor in expected.items()
        )
        write_model(tensors, directory, like, expected)


def measure(*command) -> dict[str, float]:
    """Runs a conversion in a process of its own; its seconds, and MiB over bare."""
    done = subprocess.run(
        [sys.executable, __file__, "--measured", *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *said, figures = done.stdout.splitlines()
    print("\n".join(said))
    return json.loads(figures)


def run_measured(module: str, *arguments: str) -> None:
    """The process of `measure`."""
    importlib.import_module(f"checkpoints_convert.{module}")
    sys.argv = [module, *arguments]
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM, the peak, anew
    bare, start = kib("VmRSS"), time.perf_counter()
    runpy.run_module(f"checkpoints_convert.{module}", run_name="__main__")
    seconds = round(time.perf_counter() - start, 2)
    print(json.dumps({"seconds": seconds, "mib_over_bare": (kib("VmHWM") - bare) // 1024}))


def kib(key: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def time_copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    seconds = round(time.perf_counter() - start, 2)
    shutil.rmtree(target)
    return seconds


def show(result: dict, runs: dict[str, list[dict]]) -> None:
    print(f"\n{result['model_mib']} MiB of weights{', with --check' * result['check']}")
    print(f"{'':20s}{'median s':>10s}{'min':>8s}{'max':>8s}{'MiB over bare':>16s}")
    for name, rows in runs.items():
        seconds = [row["seconds"] for row in rows]
        times = f"{statistics.median(seconds):>10.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}"
        memory = max((row.get("mib_over_bare", 0) for row in rows), default=0)
        print(f"{name:20s}{times}{memory or '':>16}")


if __name__ == "__main__":
    main()
