"""A picture of a run's curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

PANELS = {
    "accuracy": ("student_accuracy", "baseline_accuracy", "eval_sampled_student_accuracy"),
    "reward": ("reward",),
    "share of teachings": ("improvement_rate", "degradation_rate", "leak_rate"),
    "tokens": ("teaching_length_mean", "completions/mean_length"),
    "loss": ("loss", "eval_loss"),
    "KL from the reference": ("kl",),
    "trainer and engine disagree by (mismatch - 1)": ("sampling/mismatch",),
}


def draw_curves(records: list[dict], title: str | None = None) -> Figure:
    """Draws those of PANELS that `records` (metrics.jsonl) have, over steps."""
    measured = {name for record in records for name in record}
    panels = {panel: names for panel, names in PANELS.items() if measured & {*names}}
    rows = max(1, -(-len(panels) // 2))
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(11, 3.5 * rows), constrained_layout=True, squeeze=False
    )
    for axis, (panel, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            _draw(axis, records, name)
        axis.set_title(panel)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    return figure


def plot_curves(records: list[dict], file: Path, title: str) -> None:
    """Draws the curves into `file` (PNG)."""
    figure = draw_curves(records, title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw(axis, records: list[dict], name: str) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if name == "sampling/mismatch":
        points = [(step, value - 1) for step, value in points]
    if points:
        style = "o-" if name.startswith("eval_") else "-"
        axis.plot(*zip(*points, strict=True), style, label=name, markersize=4)
