"""A picture of a teaching run's curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = {
    "accuracy": ("student_accuracy", "baseline_accuracy", "eval_sampled_student_accuracy"),
    "reward": ("reward",),
    "KL from the first teacher": ("kl",),
    "trainer and engine disagree by (mismatch - 1)": ("sampling/mismatch",),
}


def plot_curves(records: list[dict], file: Path, title: str) -> None:
    """Draws the metrics of `records` (metrics.jsonl) over steps into `file` (PNG)."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (name, metrics) in zip(axes.flat, PANELS.items(), strict=True):
        for metric in metrics:
            points = [(r["step"], r[metric]) for r in records if metric in r]
            if metric == "sampling/mismatch":
                points = [(step, value - 1) for step, value in points]
            if points:
                style = "o-" if metric.startswith("eval_") else "-"
                axis.plot(*zip(*points, strict=True), style, label=metric, markersize=4)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(metrics) > 1:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
