"""The demo for several seeds, and one table of what came out.

    python -m examples.demo.seeds [--seeds 0 1 2 3 4] [--rewards adaptive adaptive_likelihood]

A seed that has a result already is not run again; remove its result.json for that.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "student_alone": "student alone",
    "taught_before": "taught, before training",
    "taught_after": "taught, after training",
    "gain": "gain",
    "non_degradation_before": "right answers kept, before",
    "non_degradation": "right answers kept, after",
    "taught_after_greedy": "greedy guidance, after",
    "teaching_tokens": "teaching tokens, after",
    "student_hidden_share": "student's attempts during training",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rewards", nargs="+", default=["adaptive", "adaptive_likelihood"])
    arguments = parser.parse_args()
    for reward in arguments.rewards:
        results = [result(seed, reward) for seed in arguments.seeds]
        print(f"\nreward={reward}\n{table(arguments.seeds, results)}", flush=True)


def result(seed: int, reward: str) -> dict:
    """The figures of one run, which is made where they are not there."""
    directory = ROOT / f"outputs/demo/seed-{seed}"
    file = directory / ("result.json" if reward == "adaptive" else f"{reward}/result.json")
    if not file.exists():
        command = ["-m", "examples.demo.run", f"--seed={seed}", f"--reward={reward}"]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    found = json.loads(file.read_text())
    return found | {"gain": found["taught_after"] - found["taught_before"]}


def table(seeds: list[int], results: list[dict]) -> str:
    """Markdown: a row for each figure, a column for each seed, and the mean."""
    heads = ["", *(f"seed {seed}" for seed in seeds), "mean"]
    lines = [heads, ["---"] * len(heads)]
    for name, title in FIGURES.items():
        values = [found[name] for found in results]
        lines.append([title, *(f"{value:.3f}" for value in [*values, fmean(values)])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
