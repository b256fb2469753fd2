"""Runs of GRPOTrainer at several layouts, in one launch of four processes.

    torchrun --nproc-per-node 4 grpo_worker.py OUTPUT

For each case the first ranks form a world of its size; they share one engine. Ranks write the
errors they meet to OUTPUT/NAME.RANK.txt. The last case ends the worker with an error.
"""

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig

from grpo_mcore.errors import ConfigError, KnownError
from tests.trainers.grpo_jobs import (
    CHATS,
    Judge,
    SharedEngine,
    add_numbers,
    job,
    place_reward,
    rollout,
    trainer_of,
    write_chat_model,
)

GENERATIONS = {
    "num_iterations": 2,
    "max_steps": 4,
    "use_kl_in_reward": True,
    "kl_estimator": "k1",
    "beta": 0.5,
    "top_entropy_quantile": 0.8,
    "entropy_coef": 0.01,
    "off_policy_mask_threshold": 1.0,
}
"""Two generations, each used twice; all that the loss wants to know of other ranks."""
SAVED = "1x2x1 virtual pipeline"
SAVED_STEP = 3
LAYOUTS = {
    "1x1x1": {},
    "2x1x1 sequence parallel": {"model": {"sequence_parallel": True}},
    SAVED: {
        "model": {"virtual_pipeline": 2},
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
    },
    "1x1x2 budget": {"max_tokens_per_micro_batch": 64},
    "1x2x2": {},
    "2x1x2": {},
}
REFUSED = "1x1x2 budget"
"""The case that is then asked for a loss of completions that its ranks cannot share."""
AFTER_REFUSAL = "after the refusal"
"""The folder of the model it saves after that."""
AGAIN = "saved again"
"""The folder of what a resumed run saves before it goes on."""
RESUMED = {
    "1x1x1 resumed": {},
    "1x2x1 resumed": {},
    "2x1x2 sequence parallel resumed": {"model": {"sequence_parallel": True}},
}


def rollout_that_fails(prompts, trainer) -> dict[str, list]:
    if int(os.environ["RANK"]) == 1:
        raise LookupError("no samples today")
    return rollout(prompts, trainer)


def reward_that_fails(prompts, completions, **_) -> list[float]:
    raise LookupError("no reward today")


SAMPLES = {
    "environment": {"environment": Judge, "reward": [], "train_dataset": CHATS},
    "tools": {"tools": [add_numbers], "train_dataset": CHATS},
    "rollout": {"rollout_func": rollout, "reward": place_reward},
    "adapters": {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "max_steps": 3},
}
"""Where samples come from, and adapters; each in one process and with two data parallel ranks."""
FAILURES = {
    "1x1x2 rollout fails": {"rollout_func": rollout_that_fails},
    "2x1x2 reward fails": {"reward": reward_that_fails},
}


def cases(output: Path) -> dict[str, dict]:
    checkpoint = output / SAVED / "checkpoints" / f"iter_{SAVED_STEP:07d}"
    samples = {
        f"{layout} {name}": others | {"max_completion_length": 150}
        for name, others in SAMPLES.items()
        for layout in ("1x1x1", "1x1x2")
    }
    resumed = {name: others | {"resume": str(checkpoint)} for name, others in RESUMED.items()}
    cycles = {name: GENERATIONS | others for name, others in (LAYOUTS | resumed).items()}
    return cycles | samples | FAILURES


def main() -> None:
    output = Path(sys.argv[1])
    rank = int(os.environ["RANK"])
    # Below the ports that the system gives to connections, of which there are many here.
    port = 10000 + int(os.environ["MASTER_PORT"]) % 20000
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each small world has its own store
    if rank == 0:
        write_chat_model(output / "model")
        (output / "model.done").touch()
    wait_for(output / "model.done")
    engine = SharedEngine()
    for number, (name, settings) in enumerate(cases(output).items(), 1):
        layout = name.split()[0]
        tensor, pipeline, data = map(int, layout.split("x"))
        if rank < tensor * pipeline * data:
            size = str(tensor * pipeline * data)
            os.environ |= {"WORLD_SIZE": size, "MASTER_PORT": str(port + number)}
            run_case(name, settings | {"layout": layout}, engine, output, rank)
        wait_for(output / f"{name}.done")
    # The last one fails, and takes the engine with it.
    engine.pool.close = engine.end
    if engine.pool.engine:
        (output / "engine.pid").write_text(str(engine.pool.engine.process.pid))
    os.environ["MASTER_PORT"] = str(port)
    make_trainer(name, settings | {"layout": layout}, output / "last").train()


def run_case(name: str, settings: dict, engine: SharedEngine, output: Path, rank: int) -> None:
    trainer = make_trainer(name, settings, output / name)
    try:
        if name in RESUMED:
            trainer.save_checkpoint(str(output / name / AGAIN))
        with engine.calling_tools() if "tools" in settings else nullcontext():
            trainer.train()
        if name == REFUSED:
            refuse_loss(trainer, output / name / AFTER_REFUSAL)
    except (KnownError, LookupError) as error:
        (output / f"{name}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    trainer.close()
    if rank == 0:
        (output / f"{name}.done").touch()


def refuse_loss(trainer, folder: Path) -> None:
    ones = torch.ones(3, 2, dtype=torch.long)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    try:
        trainer.compute_loss(None, dict.fromkeys(names, ones) | {"advantages": torch.ones(3)})
    except ConfigError as error:
        assert "3 completions do not divide by 2 data parallel ranks" in str(error)
        trainer.save_model(str(folder))


def make_trainer(name: str, settings: dict, directory: Path):
    arguments = ("reward", "train_dataset", "environment", "tools", "rollout_func", "peft_config")
    others = {key: value for key, value in settings.items() if key in arguments}
    settings = {key: value for key, value in settings.items() if key not in arguments}
    return trainer_of(job(directory.parent / "model", directory, **settings), **others)


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


if __name__ == "__main__":
    main()
