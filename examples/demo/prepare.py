"""Makes the demo's data and its two models: random weights, then SFT by this project's trainer.

    python -m examples.demo.prepare SEED

The result is kept and reused as long as the code that made it and the seed are the same.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from grpo_mcore.config import ModelConfig, SFTConfig, TeacherGRPOConfig

ROLES = ("student", "teacher")
SFT_STEPS = 500


def models_dir(seed: int) -> Path:
    """Where the models and data of `seed` are kept."""
    return Path("outputs/demo") / f"seed-{seed}" / "models"


def sft_config(role: str, directory: Path, seed: int) -> SFTConfig:
    """One process and one thread a model: both train side by side on two cores."""
    return SFTConfig(
        output_dir=str(directory / "sft" / role),
        seed=seed,
        max_steps=SFT_STEPS,
        learning_rate=2e-3,
        min_learning_rate=1e-4,
        lr_scheduler_type="linear",
        warmup_steps=30,
        stable_steps=270,
        weight_decay=0.01,
        adam_beta2=0.95,
        save_strategy="no",
        shuffle_dataset=False,
        batch_size=64,
        per_device_train_batch_size=64,
        model=ModelConfig(path=str(directory / "random" / role)),
        train=str(directory / "data" / f"{role}_sft.jsonl"),
    )


def prepare(config: TeacherGRPOConfig) -> None:
    """What the demo's experiment runs before its job: the models of the run's seed."""
    make_models(config.seed)


def make_models(seed: int) -> Path:
    """Makes what is missing, one process at a time. Returns the directory."""
    directory = models_dir(seed)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        _make_models(directory, seed)
    return directory


def _make_models(directory: Path, seed: int) -> None:
    key = _key(seed)
    marker = directory / "made_from.txt"
    if marker.exists() and marker.read_text() == key:
        return
    from examples.demo.models import write_data, write_random_model

    shutil.rmtree(directory, ignore_errors=True)
    write_data(directory / "data", seed)
    for number, role in enumerate(ROLES):
        write_random_model(directory / "random" / role, 2 * seed + number)
    _train(directory, seed)
    for role in ROLES:
        (directory / "sft" / role / "final").rename(directory / role)
    marker.write_text(key)


def _train(directory: Path, seed: int) -> None:
    processes = {}
    for role in ROLES:
        (directory / "sft" / role).mkdir(parents=True)
        with (directory / "sft" / role / "log.txt").open("wb") as log:
            processes[role] = subprocess.Popen(
                [sys.executable, "-m", "examples.demo.prepare", str(seed), role],
                env=_single_process_environment(),
                stdout=log,
                stderr=log,
            )
    total = len(ROLES) * SFT_STEPS
    print(f"supervised training of student and teacher: {total} steps, about 90 s", flush=True)
    with tqdm(total=total, unit="step", disable=None) as bar:
        while any(process.poll() is None for process in processes.values()):
            bar.update(sum(_lines(directory / "sft" / role) for role in ROLES) - bar.n)
            time.sleep(0.5)
        bar.update(sum(_lines(directory / "sft" / role) for role in ROLES) - bar.n)
    for role, process in processes.items():
        if process.returncode:
            log = (directory / "sft" / role / "log.txt").read_text()
            raise RuntimeError(f"SFT of the demo's {role} failed:\n{log[-3000:]}")


def _single_process_environment() -> dict[str, str]:
    """Without torchrun's variables: under torchrun this runs in a rank, its children do not."""
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(torchrun)}
    root = str(Path(__file__).resolve().parents[2])
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


def _lines(directory: Path) -> int:
    file = directory / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _key(seed: int) -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in ("models.py", "prepare.py", "problems.py", "tokenizer.py"):
        digest.update((here / name).read_bytes())
    settings = asdict(sft_config("student", Path(), seed))
    return f"{digest.hexdigest()} {json.dumps(settings)}"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) == 1:
        make_models(int(arguments[0]))
    else:
        from grpo_mcore import SFTTrainer

        SFTTrainer(
            sft_config(arguments[1], models_dir(int(arguments[0])), int(arguments[0]))
        ).train()
