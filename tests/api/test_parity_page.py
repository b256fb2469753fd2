"""The page of what is shown says what the markers say."""

import subprocess
import sys
from pathlib import Path

from tests.api.rows import DOCUMENTS, NOT_YET, ROWS
from tools.api_parity import faults, render

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_those_of_the_documents():
    rows = [row for rows in DOCUMENTS.values() for row in rows]
    assert rows == list(ROWS)
    assert rows[:87] == list(range(1, 88))


def test_page_is_what_the_markers_give_and_every_row_has_a_test_or_a_reason():
    command = [sys.executable, str(ROOT / "tools" / "api_parity.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_row_with_neither_is_named_and_so_is_a_marker_of_no_row():
    row = next(row for row in ROWS if row not in NOT_YET)
    tests = {row: {"tests/some.py::test_it"} for row in ROWS}
    assert faults(tests) == []
    assert f"| {row} | " in render(tests) and "`some.py::test_it`" in render(tests)
    del tests[row]
    tests[99] = {"tests/some.py::test_it"}
    assert faults(tests) == [
        f"row {row}: {ROWS[row].name} has neither a test nor a reason in NOT_YET",
        "row 99: there is none, but tests/some.py::test_it shows it",
    ]
