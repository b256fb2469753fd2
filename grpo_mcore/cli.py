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
    planner = commands.add_parser("plan", help="estimate a job's memory, without running it")
    planner.add_argument("config", help="an experiment's name, or the YAML file of one")
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
    if arguments.command == "plan":
        from grpo_mcore.memory.command import run

        # Those that stand behind an option argparse leaves over.
        arguments.overrides += others
        run(arguments)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")

    from grpo_mcore.launch import launch

    launch(arguments.script, arguments.overrides)


if __name__ == "__main__":
    main()
