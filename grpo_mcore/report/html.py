"""A run as one HTML file that needs nothing beside it: settings, curves, the last evaluation, and
the lessons that changed what the student can do, in a table to search."""

from collections import deque
from html import escape
from io import StringIO
from pathlib import Path
from string import Template

from grpo_mcore.config.record import CONFIG
from grpo_mcore.errors import ConfigError
from grpo_mcore.report.progress import read_records

TEMPLATE = Path(__file__).with_name("report.html")
MOST_LESSONS, MOST_CHARACTERS = 1000, 4000
"""What a browser still searches while one types: lessons shown, and characters of each text."""
COLUMNS = ("step", "outcome", "reward", "leaks", "question", "ground_truth", "teaching", "answer")
"""Of a lesson; the rest unfolds below."""


def write_report(directory: Path) -> Path:
    """Writes `report.html` of the run in `directory`, which may still be going on.

    Raises:
        ConfigError: when there is no run.
    """
    if not (directory / "metrics.jsonl").exists():
        raise ConfigError(f"report {directory}: has no metrics.jsonl; name a run's output_dir")
    from grpo_mcore.report.curves import draw_curves  # matplotlib takes a while to import

    records = list(read_records(directory, "metrics"))
    settings = directory / CONFIG
    page = Template(TEMPLATE.read_text()).substitute(
        title=escape(str(directory)),
        steps=max((record["step"] for record in records), default=0),
        settings=escape(settings.read_text()) if settings.exists() else "not recorded",
        curves=_svg(draw_curves(records)),
        evaluation=_evaluation(records),
        **_lessons(directory),
    )
    file = directory / "report.html"
    # A dataset's JSON can hold half a character, which no encoding has.
    file.write_text(page, "utf-8", "xmlcharrefreplace")
    return file


def _svg(figure) -> str:
    from matplotlib import pyplot, rc_context

    text = StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    _, start, rest = text.getvalue().partition("<svg")  # behind it stands an XML file's head
    return start + rest


def _evaluation(records: list[dict]) -> str:
    """The newest evaluation, as rows of a table."""
    evaluations = [r for r in records if any(name.startswith("eval_") for name in r)]
    if not evaluations:
        return "<tr><td>none was made</td></tr>"
    newest = evaluations[-1]
    found = {name: value for name, value in newest.items() if name.startswith("eval_")}
    return _row("after step", newest["step"]) + "".join(_row(*entry) for entry in found.items())


def _lessons(directory: Path) -> dict[str, str]:
    """The table of lessons, and what it leaves out."""
    file, count = directory / "lessons.jsonl", 0
    newest: deque[dict] = deque(maxlen=MOST_LESSONS)
    if file.exists():
        for lesson in read_records(directory, "lessons"):
            newest.append(lesson)
            count += 1
    bound = f"The newest {len(newest)} of {count} lessons that changed the student's accuracy"
    return {
        "bound": f"{bound}; texts are cut at {MOST_CHARACTERS} characters. All: lessons.jsonl.",
        "heads": "".join(f"<th>{escape(name)}</th>" for name in COLUMNS),
        "lessons": "\n".join(_lesson(lesson) for lesson in reversed(newest)),
    }


def _lesson(lesson: dict) -> str:
    cells = "".join(f"<td>{_text(lesson.get(name))}</td>" for name in COLUMNS[:-1])
    rest = "".join(_row(name, lesson[name]) for name in lesson if name not in COLUMNS)
    more = f"<details><summary>more</summary><table>{rest}</table></details>"
    answer = f"<td>{_text(lesson.get(COLUMNS[-1]))}{more}</td>"
    marks = f'data-step="{_text(lesson["step"])}" data-outcome="{_text(lesson["outcome"])}"'
    return f"<tr {marks}>{cells}{answer}</tr>"


def _row(name: str, value: object) -> str:
    return f"<tr><th>{escape(name)}</th><td>{_text(value)}</td></tr>"


def _text(value: object) -> str:
    text = _plain(value)
    cut = text[:MOST_CHARACTERS] + " […]" if len(text) > MOST_CHARACTERS else text
    return escape(cut)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return "\n\n".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
