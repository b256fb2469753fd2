"""A run's records in its output directory, and its lines on the terminal. Rank 0 only."""

import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm


class Progress:
    """A progress bar, a line for each step, and JSON lines on disk."""

    def __init__(
        self,
        directory: Path,
        first_step: int,
        max_steps: int,
        shown: dict[str, str],
        resumed: bool = False,
    ):
        """
        Args:
            resumed: drop what an interrupted run recorded after `first_step`.
            shown: the metrics of a step's or an evaluation's line: name -> format such as
                "reward {:+.3f}".
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.shown = directory, shown
        self.bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            disable=None,  # a bar belongs on a terminal, not in a log file
        )
        if resumed:
            for name in ("metrics", "completions", "lessons"):
                _forget_after(directory / f"{name}.jsonl", first_step)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Records a finished training step (counted from 1)."""
        self.record(step, metrics)
        self.say(f"step {step:4d}  {self._line(metrics)}")
        self.bar.update()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Records an evaluation after `step` steps; its metrics begin with "eval_"."""
        self.record(step, metrics)
        self.say(f"eval {step:4d}  {self._line(metrics)}")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self._append("metrics", {"step": step} | metrics)

    def completions(self, step: int, rows: list[dict]) -> None:
        for row in rows:
            self._append("completions", {"step": step} | row)

    def lessons(self, step: int, rows: list[dict]) -> None:
        for row in rows:
            self._append("lessons", {"step": step} | row)

    def say(self, text: str) -> None:
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()

    def _line(self, metrics: dict[str, float]) -> str:
        return "  ".join(
            f.format(metrics[name]) for name, f in self.shown.items() if name in metrics
        )

    def _append(self, name: str, record: dict) -> None:
        with (self.directory / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(directory: Path) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    return list(read_records(directory, "metrics"))


def read_records(directory: Path, name: str) -> Iterator[dict]:
    """The records of a run's `name`.jsonl, but for one that is being written."""
    with (directory / f"{name}.jsonl").open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def has_steps(directory: Path) -> bool:
    """Whether a run has made a step there. An evaluation before the first is none."""
    file = directory / "metrics.jsonl"
    return file.exists() and any('"step": 0,' not in line for line in file.open())


def _forget_after(file: Path, step: int) -> None:
    """Drops what an interrupted run recorded after the checkpoint it now goes on from (all of it
    where there is none); the last line may be half a line."""
    if file.exists():
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in whole if step and json.loads(line)["step"] <= step]
        work = file.with_suffix(".partial")
        work.write_text("".join(kept))
        work.replace(file)
