"""The `grpo-mcore` command."""

import argparse
from pathlib import Path

from grpo_mcore import __version__


def main() -> None:
    parser = argparse.ArgumentParser(prog="grpo-mcore", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    starter = commands.add_parser("launch", help="check a job, then run SCRIPT under torchrun")
    starter.add_argument("script")
    starter.add_argument("overrides", nargs=argparse.REMAINDER)
    reporter = commands.add_parser("report", help="write RUN_DIR/report.html of a run")
    reporter.add_argument("run_dir", type=Path, help="the run's output_dir")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return _report(arguments.run_dir)

    from grpo_mcore.launch import launch

    launch(arguments.script, arguments.overrides)


def _report(run_dir: Path) -> None:
    from grpo_mcore.launch import one_line_errors
    from grpo_mcore.report.html import write_report

    with one_line_errors():
        print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    main()
