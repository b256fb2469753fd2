"""The report of a run: one file that shows everything and runs nothing of what models wrote."""

import json
import re
import shutil
import subprocess
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


def test_texts_in_texts_are_shown_as_they_are(tmp_path):
    more = {"baselines": ["first\nline", "second"], "rewards": {"adaptive": 1.25, "rim": None}}
    text = write_report(write_run(tmp_path, [lesson(1, **more)])).read_text()
    assert "<th>baselines</th><td>first\nline\n\nsecond</td>" in text
    assert "<th>rewards</th><td>adaptive: 1.25\nrim: None</td>" in text


def test_half_a_character_does_not_stop_the_report(tmp_path):
    file = write_report(
        write_run(tmp_path, [lesson(1, question="half \ud83d", answer="ganz \u00e4")])
    )
    assert "half &#55357;" in file.read_text("utf-8") and "ganz \u00e4" in file.read_text("utf-8")


class Rows(Page):
    """The lessons as a browser hands them to the script."""

    def __init__(self, file: Path):
        self.rows = []
        super().__init__(file)

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        if tag == "tr" and "data-step" in (marks := dict(attributes)):
            dataset = {"step": marks["data-step"], "outcome": marks["data-outcome"]}
            self.rows.append({"dataset": dataset, "textContent": "", "hidden": False})

    def handle_data(self, data):
        if self.rows and self.lasttag != "script":
            self.rows[-1]["textContent"] += data


BROWSER = """
const lessons = %s, fields = {}, listeners = {};
for (const id of ["text", "outcome", "first", "last", "shown"]) fields[id] = {value: ""};
globalThis.document = {
  getElementById: id => fields[id], querySelectorAll: () => lessons,
  forms: [{addEventListener: (event, listener) => listeners[event] = listener}],
};
%s
const answers = %s.map(typed => {
  for (const id in fields) fields[id].value = typed[id] ?? "";
  listeners.input();
  const left = lessons.filter(row => !row.hidden);
  return [left.map(row => +row.dataset.step), fields.shown.textContent];
});
console.log(JSON.stringify(answers));
"""
SEARCHES = {
    '{"text": ""}': [10, 2, 1],
    '{"text": "<B> & STRA\u00dfe"}': [2],
    '{"text": "in the plan"}': [10],
    '{"outcome": "degraded"}': [2],
    '{"outcome": "improved", "first": "2"}': [10],
    '{"last": "2"}': [2, 1],
    '{"first": "2", "last": "9"}': [2],
    '{"text": "nowhere"}': [],
}


@pytest.mark.skipif(not shutil.which("node"), reason="runs the page's script in node")
def test_the_search(tmp_path):
    lessons = [
        lesson(1),
        lesson(2, outcome="degraded", question="<b> & Stra\u00dfe"),
        lesson(10, plan="found in the plan"),
    ]
    file = write_report(write_run(tmp_path, lessons))
    (script,) = re.findall(r"<script>(.*?)</script>", file.read_text(), re.DOTALL)
    program = BROWSER % (json.dumps(Rows(file).rows), script, f"[{', '.join(SEARCHES)}]")
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    shown = [(steps, f"{len(steps)} shown") for steps in SEARCHES.values()]
    assert list(map(tuple, json.loads(done.stdout))) == shown


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
