"""Where do trainer and engine begin to compute different things?

    python tools/diagnose_mismatch.py MODEL
    torchrun --nproc-per-node 4 tools/diagnose_mismatch.py MODEL --layout 2x2x1

Runs prompts through the Megatron model and through an engine that was given its weights, and
compares what embedding, norms, attention, feed-forward and output layers compute. The first module
whose relative difference |trainer - engine| / |trainer| (2-norms) is above --tolerance is named;
what it was given was still the same. Exit code 1: there is one.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.launch import one_line_errors

device.prepare()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo_mcore.rollout.probe import join_workers  # noqa: E402
from grpo_mcore.training.probe import probe_model  # noqa: E402
from tools.pair import Pair, open_pair, pair_parser  # noqa: E402

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""What rounding explains: a few hundred times the type's precision, as it adds up over layers."""


@dataclass
class Difference:
    """How a module's outputs differ over all prompts."""

    module: str
    largest: float = 0.0
    relative: float = 0.0
    """The largest of a prompt."""


def main() -> None:
    parser = pair_parser(__doc__.splitlines()[0], Path("outputs/diagnose_mismatch.json"))
    parser.add_argument(
        "--engine-model", help="give the engine the weights of this directory, not those of MODEL"
    )
    parser.add_argument(
        "--tolerance", type=float, help="by default, by --dtype: " + str(TOLERANCES)
    )
    arguments = parser.parse_args()
    given = arguments.engine_model
    with one_line_errors(), open_pair(arguments, 1, True, engine_model=given) as pair:
        if given:
            pair.push_from(given, arguments.dtype)
        else:
            pair.sync.push(1)
        tolerance = arguments.tolerance or TOLERANCES[arguments.dtype]
        differences = pair.role.broadcast(compare_modules(pair))
    first = first_beyond(differences, tolerance)
    if pair.role.rank == 0:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        found = {"first": first, "tolerance": tolerance, "modules": [vars(d) for d in differences]}
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
        show(differences, first, tolerance)
        print(f"written: {arguments.output}")
    sys.exit(first is not None)


def compare_modules(pair: Pair) -> list[Difference]:
    """By module, in the order in which the trainer's model computes them; [] but on rank 0."""
    found: dict[str, Difference] = {}
    engines = [None] * len(pair.prompts)
    if pair.pool.engine:
        engines = [join_workers(w) for w in pair.pool.engine.call("probe", pair.prompts)]
    for prompt, engine in zip(pair.prompts, engines, strict=True):
        trainer = probe_model(
            pair.chunks, pair.shape, pair.role, prompt, pair.split.length_multiple
        )
        for name, ours in trainer.items() if engine else ():
            gap = ours - engine[name][: len(prompt)]
            difference = found.setdefault(name, Difference(name))
            relative = (gap.norm() / ours.norm()).item()
            difference.largest = max(difference.largest, gap.abs().max().item())
            difference.relative = max(difference.relative, relative)
    return list(found.values())


def first_beyond(differences: list[Difference], tolerance: float) -> str | None:
    """The first module that differs by more than `tolerance`; what is not a number does."""
    return next((d.module for d in differences if not d.relative <= tolerance), None)


def show(differences: list[Difference], first: str | None, tolerance: float) -> None:
    width = max(len(difference.module) for difference in differences)
    print(f"{'module':{width}s}{'max |d|':>12s}{'relative':>12s}")
    for difference in differences:
        mark = "  <- first" if difference.module == first else ""
        print(
            f"{difference.module:{width}s}{difference.largest:12.2e}{difference.relative:12.2e}"
            + mark
        )
    if first:
        print(f"first module that differs by more than {tolerance:g} of its output: {first}")
    else:
        print(f"no module differs by more than {tolerance:g} of its output")


if __name__ == "__main__":
    main()
