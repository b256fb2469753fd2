"""The demo, from nothing to a table and a picture: `make demo`.

    python -m examples.demo.run [--seed N] [--steps N] [--reward NAME]

Makes data and models (kept for the next time), trains the teacher at TP2 x PP2 beside the student,
five processes in all, with examples/run_teacher_grpo.sh, then measures the exported teacher.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from examples.demo.measure import measure
from examples.demo.prepare import make_models, models_dir
from grpo_mcore.config.compose import compose_config
from grpo_mcore.report.curves import plot_curves
from grpo_mcore.report.progress import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path("examples/run_teacher_grpo.sh")
PROCESSES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps (default: the experiment's)")
    parser.add_argument("--reward", default="adaptive", help="an option of examples/configs/reward")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    started = time.time()
    overrides = ["layout=demo", f"seed={arguments.seed}", f"reward={arguments.reward}"]
    if arguments.reward != "adaptive":
        overrides.append(f"output_dir=outputs/demo/seed-{arguments.seed}/{arguments.reward}/run")
    if arguments.steps:
        overrides.append(f"max_steps={arguments.steps}")
    config = compose_config(SCRIPT.parent / "configs", "demo", overrides)
    run = Path(config.output_dir)
    _set_aside(run)
    make_models(config.seed)
    prepared = time.time()
    environment = os.environ | {"NPROC_PER_NODE": str(PROCESSES), "PYTHON": sys.executable}
    subprocess.run(["bash", SCRIPT, "experiment=demo", *overrides], check=True, env=environment)
    trained = time.time()

    alone = compose_config(
        SCRIPT.parent / "configs",
        "demo",
        [f"seed={config.seed}", "data.eval_size=0", f"output_dir={run}/measure"],
    )
    figures = measure(alone, run / "final", models_dir(config.seed) / "data/unseen_wordings.jsonl")
    finished = time.time()
    result = figures | {
        "steps": config.max_steps,
        "seconds": round(finished - started, 1),
        "seconds_models": round(prepared - started, 1),
        "seconds_training": round(trained - prepared, 1),
        "seconds_measuring": round(finished - trained, 1),
        "layout": f"teacher {config.layout.teacher}, student {config.layout.student} (TPxPPxDP)",
        "seed": config.seed,
        "reward": arguments.reward,
        "student_hidden_share": _hidden_share(read_metrics(run)),
    }
    picture = run.parent / "curves.png"
    plot_curves(read_metrics(run), picture, f"adaptive teaching, demo, seed {config.seed}")
    for directory in (run.parent, Path("outputs/demo")):
        (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result))
    print(f"result: {run.parent / 'result.json'}   curves: {picture}   teacher: {run / 'final'}")


def _set_aside(run: Path) -> None:
    """Keeps an earlier run under the time at which it was made."""
    if run.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(run.stat().st_mtime))
        run.rename(run.with_name(f"run-{stamp}"))


def _hidden_share(records: list[dict]) -> float:
    """The share of the student's time for its attempts, over the whole run, in which the teacher
    trained; of the first step's attempts nothing can be."""
    hidden, all_of_it = (
        sum(record.get(f"time/{name}", 0.0) for record in records)
        for name in ("student_attempts_during_training", "student_attempts")
    )
    return hidden / all_of_it


def _table(result: dict) -> str:
    unseen = result["unseen_wordings_figures"]
    rows = [
        ("", "held-out problems", "unseen wordings"),
        ("student alone", result["student_alone"], unseen["student_alone"]),
        ("taught, before training", result["taught_before"], unseen["taught_before"]),
        ("taught, after training", result["taught_after"], unseen["taught_after"]),
        ("  with greedy guidance, before", result["taught_before_greedy"],
         unseen["taught_before_greedy"]),
        ("  with greedy guidance, after", result["taught_after_greedy"],
         unseen["taught_after_greedy"]),
        ("right answers kept", result["non_degradation"], unseen["non_degradation"]),
        ("control: best single hint for all", result["constant_guidance"], ""),
        ("control: learned hints, shuffled", result["shuffled_guidance"], ""),
        ("student's attempts during training", result["student_hidden_share"], ""),
    ]  # fmt: skip
    lines = [
        f"{name:36s}" + "".join(f"{v:>20.3f}" if v != "" and not isinstance(v, str) else f"{v:>20s}"
                                for v in values)
        for name, *values in rows
    ]  # fmt: skip
    facts = (
        f"{result['steps']} steps, {result['layout']}, reward {result['reward']}, "
        f"seed {result['seed']}"
    )
    times = (
        f"{result['seconds']:.0f} s: models {result['seconds_models']:.0f}, training "
        f"{result['seconds_training']:.0f}, measuring {result['seconds_measuring']:.0f}"
    )
    return "\n".join(["", *lines, "", facts, times])


if __name__ == "__main__":
    main()
