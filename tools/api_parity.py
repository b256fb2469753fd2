"""Writes docs/api_parity.md: each row of tests/api/rows.py with the tests whose marker names it.

python tools/api_parity.py           writes the page
python tools/api_parity.py --check   says what is wrong with it, and exits with 1
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api_parity.md"
sys.path.insert(0, str(ROOT))

from tests.api.rows import DOCUMENTS, NOT_YET, ROWS  # noqa: E402

HEAD = """# The documents this API follows, and the tests that show it

Written by `python tools/api_parity.py` from the test suite's `seed` markers; a test compares.
"""


def collect() -> dict[int | str, set[str]]:
    """Row -> the tests whose decorator `pytest.mark.seed` names it, as file::function.

    Raises:
        ValueError: for a marker that stands elsewhere, where it would not be seen.
    """
    tests: dict[int | str, set[str]] = defaultdict(set)
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(file.read_text())
        seen = 0
        for test in tree.body:
            for mark in filter(_is_seed, getattr(test, "decorator_list", ())):
                seen += 1
                for row in mark.args:
                    tests[ast.literal_eval(row)].add(f"{file.relative_to(ROOT)}::{test.name}")
        if seen < sum(map(_is_seed, ast.walk(tree))):
            raise ValueError(f"{file.relative_to(ROOT)}: a seed marker that decorates no test")
    return tests


def _is_seed(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.seed"


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
