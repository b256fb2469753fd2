"""What a run has left, in one line a file: for a change that is to change nothing.

    python tools/fingerprint.py RUN_DIR [RUN_DIR]

Prints the sha256 of every file of RUN_DIR/final and of the run's records, less their times. With a
second run, exit code 1 says that the two differ.
"""

import hashlib
import json
import sys
from pathlib import Path

RECORDS = ("metrics", "completions", "lessons")


def fingerprint(run: Path) -> dict[str, str]:
    """File -> sha256."""
    found = {}
    for file in sorted((run / "final").rglob("*")):
        if file.is_file():
            found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in RECORDS:
        file = run / f"{name}.jsonl"
        if file.exists():
            rows = [_untimed(json.loads(line)) for line in file.read_text().splitlines()]
            found[file.name] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return found


def _untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "sync/"))}


def main() -> None:
    prints = [fingerprint(Path(run)) for run in sys.argv[1:3]]
    if not prints or not all(prints):
        sys.exit(__doc__)
    for name, digest in prints[0].items():
        print(digest, name)
    if len(prints) == 2:
        differing = [
            n for n in prints[0].keys() | prints[1] if prints[0].get(n) != prints[1].get(n)
        ]
        print(f"differ: {', '.join(sorted(differing))}" if differing else "the same")
        sys.exit(bool(differing))


if __name__ == "__main__":
    main()
