"""From the command line to a running job: what examples/run_teacher_grpo.sh starts.

bash examples/run_teacher_grpo.sh [overrides]       -> launch(): checks, then starts torchrun
torchrun ... examples/run_teacher_grpo.sh [...]     -> run(): one rank of the job
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import ConfigError, TeacherGRPOConfig
from grpo_mcore.config.compose import compose_config
from grpo_mcore.config.functions import load_function
from grpo_mcore.errors import KnownError, MismatchError
from grpo_mcore.parallel.world import is_rank_zero, world_size
from grpo_mcore.preflight.settings import check_settings
from grpo_mcore.rewards import RewardError

CPU_EXPERIMENT, GPU_EXPERIMENT = "demo", "gsm8k_qwen2.5"
SPEAKING_SECONDS = 5.0
FOUND_BY_ALL = (ConfigError, RewardError, MismatchError)
"""Errors that every rank raises alike."""


def configure(script: Path, arguments: list[str]) -> TeacherGRPOConfig:
    """The configuration for `arguments`: Hydra overrides, and `experiment=NAME` among them.
    Without an experiment, the one for the hardware found."""
    experiment = GPU_EXPERIMENT if device.is_cuda() else CPU_EXPERIMENT
    overrides = []
    for argument in arguments:
        if argument in ("--resume", "resume"):
            overrides.append("resume=auto")
        elif argument.startswith("experiment="):
            experiment = argument.removeprefix("experiment=")
        else:
            overrides.append(argument)
    return compose_config(script.resolve().parent / "configs", experiment, overrides)


def prepare(config: TeacherGRPOConfig, script: Path) -> None:
    """Calls the experiment's `prepare` function. Every rank does, so the function locks what it
    makes.

    Raises:
        ConfigError: when there is no such function.
    """
    if config.prepare is None:
        return
    check_settings(config)  # what can be found wrong without the models it makes
    root = script.resolve().parent.parent
    load_function(f"prepare={config.prepare}", config.prepare, root)(config)


def launch(script: str, arguments: list[str]) -> None:
    """Checks the job in this process, where an error is one line, then becomes torchrun, with the
    numbers torchrun's own variables give: what the checks needed is not held beside the job."""
    from grpo_mcore.checkpoint.start import choose_start
    from grpo_mcore.preflight.teaching_job import check_job

    with one_line_errors():
        nodes = _number("NNODES", 1)
        per_node = _number("NPROC_PER_NODE", device.local_count())
        config = configure(Path(script), arguments)
        prepare(config, Path(script))
        config, _ = check_job(config, nodes * per_node)
        choose_start(config)
    address = ["--standalone"]
    if nodes > 1:
        address = [
            f"--node-rank={os.environ.get('NODE_RANK', 0)}",
            f"--master-addr={os.environ.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={os.environ.get('MASTER_PORT', 29500)}",
        ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    sizes = [f"--nnodes={nodes}", f"--nproc-per-node={per_node}"]
    os.execv(sys.executable, [*torchrun, *sizes, *address, script, *arguments])


def run(script: str, arguments: list[str]) -> None:
    """One rank of the job."""
    with one_line_errors():
        from grpo_mcore.trainers import TeacherGRPOTrainer

        config = configure(Path(script), arguments)
        prepare(config, Path(script))
        TeacherGRPOTrainer(config).train()


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{variable}={value}: give a number, 1 or more")
    return int(value)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors that explain themselves into one line and exit code 1; others keep their
    traceback."""
    try:
        yield
    except KnownError as error:
        # What every rank finds, one of them says, and is given the time to before torchrun, seeing
        # another rank gone, ends it.
        if is_rank_zero() or not isinstance(error, FOUND_BY_ALL):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif world_size() > 1:
            time.sleep(SPEAKING_SECONDS)
        sys.exit(1)
