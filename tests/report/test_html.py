"""The report of a run: one file that shows everything and runs nothing of what models wrote."""

import json
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from grpo_mcore import cli
from grpo_mcore.report import html
from grpo_mcore.report.html import write_report
from grpo_mcore.report.progress import Progress

HOSTILE = "</td></script><script>alert('$title')</script> & {x}"


def lesson(step: int, **more) -> dict:
    return {
        "step": step,
        "question": f"how many in {step}?",
        "ground_truth": "4",
        "approach": "count",
        "baselines": ["<solution>3</solution>"],
        "teaching": "look again",
        "answer": "<solution>4</solution>",
        "outcome": "improved",
        "leaks": False,
        "reward": 1.23456,
    } | more


def write_run(directory: Path, lessons: list[dict]) -> Path:
    directory.mkdir(exist_ok=True)
    metrics = [
        {"step": 0, "eval_sampled_student_accuracy": 0.25},
        {"step": 1, "reward": 0.5, "student_accuracy": 0.5, "loss": 0.1},
        {"step": 2, "reward": 0.75, "student_accuracy": 0.625, "loss": 0.1},
        {"step": 2, "eval_sampled_student_accuracy": 0.875},
    ]
    for name, rows in (("metrics", metrics), ("lessons", lessons)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text + '{"step": 3, "rew')  # still being written
    (directory / "config.yaml").write_text(f"seed: 7\nrun_name: {HOSTILE}\n")
    return directory


class Page(HTMLParser):
    """Elements by name, and what is opened and not closed."""

    def __init__(self, file: Path):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


def test_everything_is_shown(tmp_path):
    lessons = [lesson(1), lesson(2, outcome="degraded", plan="an extra column")]
    file = write_report(write_run(tmp_path, lessons))
    text = file.read_text()
    for shown in (
        "seed: 7",
        "2 steps recorded",
        "<tr><th>after step</th><td>2</td></tr>",
        "<tr><th>eval_sampled_student_accuracy</th><td>0.875</td></tr>",
        "The newest 2 of 2 lessons",
        "how many in 1?",
        "<td>1.235</td>",
        "<tr><th>approach</th><td>count</td></tr>",
        "<tr><th>plan</th><td>an extra column</td></tr>",
    ):
        assert shown in text
    rows = [a for tag, a in Page(file).elements if tag == "tr" and "data-step" in a]
    assert rows == [
        {"data-step": "2", "data-outcome": "degraded"},
        {"data-step": "1", "data-outcome": "improved"},
    ]
    for panel in ("accuracy", "reward", "loss"):
        assert f">{panel}</text>" in text
    assert ">tokens</text>" not in text  # none were measured


def test_nothing_is_fetched_and_nothing_of_the_models_runs(tmp_path):
    fields = {name: HOSTILE for name in lesson(1) if name not in ("step", "outcome")}
    file = write_report(write_run(tmp_path, [lesson(1, **fields, outcome='"><b>')]))
    page, text = Page(file), file.read_text()
    assert text.count("<script>") == 1 and text.count(escape(HOSTILE)) == len(fields) + 1
    links = [
        a for _, attributes in page.elements for a in attributes.items() if a[0] in ("src", "href")
    ]
    assert all(name != "src" for name, _ in links)
    assert "b" not in [tag for tag, _ in page.elements]


def test_a_long_run_shows_its_newest_lessons_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "MOST_CHARACTERS", 20)
    lessons = [lesson(n, teaching="long " * 9) for n in range(1, 1301)]
    text = write_report(write_run(tmp_path, lessons)).read_text()
    assert "The newest 1000 of 1300 lessons" in text and "cut at 20 characters" in text
    assert text.count("data-step=") == 1000
    assert 'data-step="1300"' in text and 'data-step="300"' not in text
    assert "<td>long long long long  […]</td>" in text


def test_a_run_of_other_trainers_has_a_report_as_well(tmp_path):
    write_run(tmp_path, [])
    for name in ("lessons.jsonl", "config.yaml"):
        (tmp_path / name).unlink()
    text = write_report(tmp_path).read_text()
    assert "not recorded" in text and "The newest 0 of 0 lessons" in text


def test_the_command(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, [lesson(1)])
    monkeypatch.setattr("sys.argv", ["grpo-mcore", "report", str(tmp_path)])
    cli.main()
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr("sys.argv", ["grpo-mcore", "report", "nowhere"])
    with pytest.raises(SystemExit):
        cli.main()
    message = "error: report nowhere: has no metrics.jsonl; name a run's output_dir\n"
    assert capsys.readouterr().err == message


def test_a_resumed_run_forgets_lessons_after_its_checkpoint(tmp_path):
    first = Progress(tmp_path, 0, 4, {})
    for step in (1, 2, 3):
        first.lessons(step, [{"outcome": "improved"}] * step)
    Progress(tmp_path, 2, 4, {}, resumed=True).lessons(3, [{"outcome": "degraded"}])
    rows = [json.loads(line) for line in (tmp_path / "lessons.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3]
    assert rows[-1]["outcome"] == "degraded"
