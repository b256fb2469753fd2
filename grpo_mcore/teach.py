"""`grpo-mcore teach`: a trained teacher and a student at work on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_mcore.config import ConfigError
from grpo_mcore.config.compose import override_config, parse_overrides, read_settings
from grpo_mcore.launch import one_line_errors

if TYPE_CHECKING:
    from grpo_mcore.trainers.tutor import Tutorial


def teach(
    teacher: str, student: str, task: str | None, config: Path | None, overrides: list[str]
) -> None:
    """Teaches `task`, or, if that is None, each line of the standard input, until its end or
    Ctrl-C.

    Args:
        config: a YAML file of settings in place of those of the run that made the teacher.
        overrides: KEY=VALUE, which go before either.
    """
    with one_line_errors():
        settings: Any = parse_overrides(overrides)
        if config:
            settings = override_config(read_settings(f"--config={config}", config), settings)

        from grpo_mcore.teaching.tutoring import check_task
        from grpo_mcore.trainers.tutor import Tutor

        if task is not None:
            check_task(task)
        # Ctrl-C is how one leaves; the engines end with the `with`.
        with suppress(KeyboardInterrupt), Tutor(teacher, student, settings) as tutor:
            if task is not None:
                print(render(tutor.teach(task)))
                return
            for line in _lines():
                try:
                    print(render(tutor.teach(line)), flush=True)
                except ConfigError as error:  # the next line may be better
                    print(f"error: {error}", file=sys.stderr, flush=True)


def render(tutorial: "Tutorial") -> str:
    """What the terminal shows."""
    found = tutorial.diagnosis
    quality = ", ".join(f"{name} {value:.2f}" for name, value in found.response_quality.items())
    gaps = "".join(f"\n  - {gap}" for gap in found.identified_gaps)
    return (
        f"student alone:\n{tutorial.alone}\n\n"
        f"diagnosis: capability {found.capability_level:.2f}, confidence "
        f"{found.confidence_score:.2f} ({quality}; {found.probe_tokens} probe tokens)\n"
        f"approach: {found.approach}\ngaps:{gaps or ' none'}\n\n"
        f"guidance ({found.guidance_form}):\n{tutorial.guidance}\n\n"
        f"student taught:\n{tutorial.taught}\n"
    )


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            print("task: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
