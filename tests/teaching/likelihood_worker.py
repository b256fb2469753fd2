"""A run of TeacherGRPOTrainer that also writes down what its engines are asked.

    torchrun ... likelihood_worker.py OVERRIDES ...

The prompts of each engine, as tokens, go to OUTPUT_DIR/asked-ENGINE.jsonl, a line for each call.
"""

import json
import sys
from pathlib import Path

from grpo_mcore.config.compose import compose_config
from grpo_mcore.launch import one_line_errors
from grpo_mcore.rollout.engine import Call, Engine
from grpo_mcore.trainers import TeacherGRPOTrainer
from tests.end_to_end.conftest import ROOT


def main() -> None:
    config = compose_config(ROOT / "examples/configs", "demo", sys.argv[1:])
    submit = Engine.submit

    def submit_and_tell(engine: Engine, method: str, *arguments) -> Call:
        if method == "generate":
            with Path(config.output_dir, f"asked-{engine.name}.jsonl").open("a") as file:
                file.write(json.dumps([request.prompt for request in arguments[0]]) + "\n")
        return submit(engine, method, *arguments)

    Engine.submit = submit_and_tell
    with one_line_errors():
        TeacherGRPOTrainer(config).train()


if __name__ == "__main__":
    main()
