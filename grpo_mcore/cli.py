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
    tutor = commands.add_parser(
        "teach", help="let a trained teacher diagnose and teach a student, task by task"
    )
    model = "a Hugging Face directory or hub id, or a run's checkpoint(s)"
    tutor.add_argument("--teacher", required=True, help=model)
    tutor.add_argument("--student", required=True, help=model)
    tutor.add_argument("--task", help="without it, each line of the input is one")
    tutor.add_argument(
        "--config", type=Path, help="YAML settings; default: those of the teacher's own run"
    )
    tutor.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="further settings")
    planner = commands.add_parser("plan", help="estimate a job's memory, without running it")
    planner.add_argument("config", help="an experiment's name, or a YAML file of settings")
    planner.add_argument("overrides", nargs="*", help="such as layout.teacher=2x1x1")
    planner.add_argument("--processes", type=int, help="ranks of the job")
    planner.add_argument(
        "--device-memory", help="GiB of each GPU, or a name such as h100_80gb; default: found here"
    )
    planner.add_argument(
        "--prompt-tokens", type=int, default=512, help="of the longest question, in its template"
    )
    planner.add_argument("--json", type=Path, help="a file to write the plan to, in bytes")
    arguments, others = parser.parse_known_args()
    if arguments.command in ("plan", "teach"):  # overrides behind an option are left over
        arguments.overrides += others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    given = vars(arguments)
    run = {"launch": _launch, "plan": _plan, "report": _report, "teach": _teach}
    run[given.pop("command")](**given)


def _launch(script: str, overrides: list[str]) -> None:
    from grpo_mcore.launch import launch

    launch(script, overrides)


def _plan(**given) -> None:
    from grpo_mcore.plan import plan

    plan(**given)


def _teach(**given) -> None:
    from grpo_mcore.teach import teach

    teach(**given)


def _report(run_dir: Path) -> None:
    from grpo_mcore.launch import one_line_errors
    from grpo_mcore.report.html import write_report

    with one_line_errors():
        print(f"report: {write_report(run_dir)}")


if __name__ == "__main__":
    main()
