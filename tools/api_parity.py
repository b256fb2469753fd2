"""Writes docs/api_parity.md: each row of tests/api/rows.py with the tests whose marker names it.

python tools/api_parity.py           writes the page
python tools/api_parity.py --check   says what is wrong with it, and exits with 1
"""

import io
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api_parity.md"
sys.path.insert(0, str(ROOT))

from tests.api.rows import DOCUMENTS, NOT_YET, ROWS  # noqa: E402

HEAD = """# The documents this API follows, and the tests that show it

Written by `python tools/api_parity.py` from the test suite's `seed` markers; a test compares.
"""


class Collector:
    """Reads the markers of all tests pytest collects.

    Attributes:
        tests: row -> the tests that name it, as file::function.
    """

    def __init__(self):
        self.tests: dict[int | str, set[str]] = defaultdict(set)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            test = item.nodeid.partition("[")[0]
            for marker in item.iter_markers("seed"):
                for row in marker.args:
                    self.tests[row].add(test)


def collect() -> dict[int | str, set[str]]:
    """
    Raises:
        RuntimeError: when a test file cannot be collected.
    """
    collector, output = Collector(), io.StringIO()
    command = ["--collect-only", "-q", f"--rootdir={ROOT}", str(ROOT / "tests")]
    with redirect_stdout(output):
        code = pytest.main(command, plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests were not collected:\n{output.getvalue()[-3000:]}")
    return collector.tests


def faults(tests: dict[int | str, set[str]]) -> list[str]:
    """Rows that no test shows, without a reason, and markers of rows that there are not."""
    found = []
    for row in dict.fromkeys([*ROWS, *NOT_YET, *tests]):
        if row not in ROWS:
            found.append(f"row {row}: there is none, but {', '.join(tests[row])} shows it")
        elif row not in tests and row not in NOT_YET:
            found.append(f"row {row}: {ROWS[row].name} has neither a test nor a reason in NOT_YET")
    return found


def render(tests: dict[int | str, set[str]]) -> str:
    lines = [HEAD]
    for document, numbers in DOCUMENTS.items():
        lines += [f"## {document}", "", "| row | name | says | here | shown by |", "|" + "---|" * 5]
        for number in numbers:
            row = ROWS[number]
            shown = [f"`{test.removeprefix('tests/')}`" for test in sorted(tests.get(number, ()))]
            if number in NOT_YET:
                shown.append(f"not yet: {NOT_YET[number]}")
            cells = (str(number), row.name, row.semantics, row.choice, "<br>".join(shown))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    tests = collect()
    wrong = faults(tests)
    if not wrong:
        page = render(tests)
        if "--check" not in sys.argv:
            PAGE.write_text(page)
        elif not PAGE.exists() or PAGE.read_text() != page:
            wrong = [f"{PAGE.relative_to(ROOT)}: is out of date; run python tools/api_parity.py"]
    for line in wrong:
        print(line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
