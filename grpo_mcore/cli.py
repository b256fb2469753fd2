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
    arguments = parser.parse_args()
    if arguments.command == "teach":
        from grpo_mcore.teach import teach

        given = vars(arguments)
        del given["command"]
        teach(**given)
    else:
        from grpo_mcore.launch import launch

        launch(arguments.script, arguments.overrides)


if __name__ == "__main__":
    main()
