"""The `grpo-mcore` command."""

import argparse

from grpo_mcore import __version__


def main() -> None:
    parser = argparse.ArgumentParser(prog="grpo-mcore", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    starter = commands.add_parser("launch", help="check a job, then run SCRIPT under torchrun")
    starter.add_argument("script")
    starter.add_argument("overrides", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()

    from grpo_mcore.launch import launch

    launch(arguments.script, arguments.overrides)


if __name__ == "__main__":
    main()
