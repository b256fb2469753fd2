"""Checkpoints of a run in Megatron's distributed format and folder layout.

    checkpoints/latest_checkpointed_iteration.txt   "40"
    checkpoints/iter_0000040/                       torch_dist shards and common state

The data position, the sampling seeds and the student's prefetched answers are functions of the step
number, so the step is all of them.
"""

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from grpo_mcore.checkpoint import distributed_adam
from grpo_mcore.training.policy import Policy

LATEST = "latest_checkpointed_iteration.txt"


def save_checkpoint(policy: Policy, step: int, directory: Path) -> None:
    """Saves the policy after `step` steps. Collective over its role, which must be this process's
    default group (Megatron takes no other). The folder is complete before it bears its name."""
    role = policy.role
    final = directory / f"iter_{step:07d}"
    work = final.with_name(final.name + ".partial")

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)

    role.once(prepare)
    with _without_main_file():
        filesystem_async._get_write_results_queue()
    dist_checkpointing.save(_state(policy, step, is_loading=False), str(work))

    def finish() -> None:
        shutil.rmtree(final, ignore_errors=True)
        work.rename(final)
        (directory / LATEST).write_text(str(step))

    role.once(finish)


def latest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in `directory`; None without one."""
    file = directory / LATEST
    return int(file.read_text()) if file.exists() else None


def load_checkpoint(policy: Policy, directory: Path) -> int:
    """Loads the newest checkpoint into the policy.

    Returns:
        The number of steps it had made.

    Raises:
        FileNotFoundError: when there is none.
    """
    step = latest_step(directory)
    if step is None:
        raise FileNotFoundError(f"{directory}: no checkpoint ({LATEST} is missing)")
    distributed_adam.before_loading(policy.optimizer)
    state = dist_checkpointing.load(
        _state(policy, step, is_loading=True), str(directory / f"iter_{step:07d}")
    )
    policy.chunks[0].load_state_dict(state["model"])
    with torch.no_grad():  # it copies into parameters that want gradients
        policy.optimizer.load_state_dict(state["optimizer"])
    distributed_adam.after_loading(policy.optimizer)
    policy.scheduler.load_state_dict(state["scheduler"])
    policy.version = state["version"]
    return state["step"]


def _state(policy: Policy, step: int, is_loading: bool) -> dict:
    metadata = {
        "dp_cp_group": policy.role.groups.dp_cp,
        # The distributed optimizer's other format corrupts what it loads where parameters' sizes
        # are no multiples of 64; this one wants the same TP x PP again.
        "distrib_optim_sharding_type": "dp_reshardable",
    }
    with _data_parallel_rank(policy):
        model = policy.chunks[0].sharded_state_dict(metadata=metadata)
        optimizer = policy.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=metadata
        )
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": policy.scheduler.state_dict(),
        "version": policy.version,
        "step": step,
    }


@contextmanager
def _without_main_file():
    """Megatron's writer starts a process, which Python would have import the user's script again:
    without an `if __name__ == "__main__"` there, the save would fail at the end of the run."""
    main = sys.modules["__main__"].__dict__
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main |= hidden


@contextmanager
def _data_parallel_rank(policy: Policy):
    """Megatron asks `parallel_state` for this rank when it shards a tied output layer."""
    parallel_state.set_data_parallel_rank(policy.role.data_rank)
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(None)
