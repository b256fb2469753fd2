"""Saves a policy with all that its run needs to go on, and loads it, at any layout. A reference
that moves is saved beside it.

    iter_0000040/
      __0_0.distcp ...  common.pt  .metadata  metadata.json    Megatron's distributed checkpoint
      state.json              the loop's and the trainer's own state
      tensors.safetensors     the trainer's tensors, if it has any
      random_00000.json ...   every rank's random generators
      config.yaml             the whole configuration
      hf/                     the model's configuration, tokenizer and chat template
      manifest.json           sizes and checksums of all these

The data position and the sampling seeds are functions of the step number, so the step is all of
them.
"""

import json
import os
import pickle
import queue
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import yaml
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.nn import ModuleList

from grpo_mcore.checkpoint import folder, manifest
from grpo_mcore.checkpoint.optimizer_state import load_states, sharded_states
from grpo_mcore.checkpoint.pickles import check_pickles
from grpo_mcore.checkpoint.random_state import random_state, restore_random_state
from grpo_mcore.config import TrainingConfig
from grpo_mcore.config.record import CONFIG, write_config
from grpo_mcore.errors import FilesError
from grpo_mcore.models.hf_files import copy_companions
from grpo_mcore.parallel.groups import Role
from grpo_mcore.training.policy import Policy, Reference

_OF_RANK = re.compile(r"(?:__|random_)(\d+)[_.]")


class CheckpointWriter:
    """Saves a policy after some of its steps. Every method is called by all ranks of its role,
    which must be the process's default group (Megatron takes no other)."""

    def __init__(
        self,
        policy: Policy,
        directory: Path,
        model_path: str,
        config: TrainingConfig,
        reference: Reference | None = None,
    ):
        """
        Args:
            directory: the folder of all checkpoints.
            model_path: the Hugging Face directory that the policy was loaded from.
            reference: one to be saved too, as it is no longer the model there.
        """
        self.policy, self.reference, self.directory = policy, reference, directory
        self.model_path, self.config = model_path, config
        self.under_way = AsyncCallsQueue()
        self.step = 0
        self.completed: list[int] = []
        """Steps whose checkpoints have been completed, for whoever wants to know."""

    def save(
        self,
        step: int,
        state: dict,
        best: int | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Saves the policy after `step` steps; with `async_save`, only begins to.

        Args:
            state: what `load_checkpoint` shall return: JSON.
            best: the step of the best checkpoint so far, to be kept.
            tensors: what it shall return as "tensors"; the same on all ranks, on the CPU.

        Raises:
            FilesError: when it cannot be written; checkpoints before it are as they were.
        """
        self.finish()
        self.step = step
        role = self.policy.role
        with self._one_line():
            work = Path(role.once(lambda: str(folder.start(self.directory, step))))
            filesystem_async._results_queue = _Results()
            request = dist_checkpointing.save(
                _sharded_state(self.policy, self.reference, is_loading=False)
                | {"step": step, "hf_model": str(Path(self.model_path).resolve())},
                str(work),
                async_sharded_save=True,
                # Not all ranks hold gathered states (see optimizer_state).
                preprocess_common_before_consistancy_check=lambda common: {},
            )
            role.once(lambda: self._describe(work, state | {"step": step}, tensors or {}))
            write_json(work / f"random_{role.rank:05d}.json", random_state())
            request.add_finalize_fn(partial(self._complete, step, work, best))
            if self.config.async_save:
                self.under_way.schedule_async_request(request)
            else:
                request.execute_sync()

    def poll(self) -> None:
        """Completes a save that every rank has written."""
        with self._one_line():
            self.under_way.maybe_finalize_async_calls()

    def finish(self) -> None:
        """Waits for a save under way, and completes it."""
        with self._one_line():
            self.under_way.maybe_finalize_async_calls(blocking=True)

    def _describe(self, work: Path, state: dict, tensors: dict[str, Tensor]) -> None:
        write_json(work / folder.STATE, state | {"layout": str(self.policy.role.layout)})
        if tensors:
            # It wants each in memory of its own. Were it to write, a full disk were no OSError.
            own = {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
            (work / folder.TENSORS).write_bytes(to_safetensors(own))
        write_config(work, self.config)
        copy_companions(self.model_path, work / folder.COMPANIONS)

    def _complete(self, step: int, work: Path, best: int | None) -> None:
        """Makes the written folder a checkpoint, and removes those beyond the limit."""
        role, limit = self.policy.role, self.config.save_total_limit
        names = [str(f.relative_to(work)) for f in work.rglob("*") if f.is_file()]
        mine = [name for name in names if _rank_that_wrote(name) == role.rank]
        entries = role.all_gather(manifest.describe(work, mine))

        def publish() -> None:
            manifest.write_manifest(work, {k: v for part in entries for k, v in part.items()})
            folder.put_in_place(work, folder.checkpoint_at(self.directory, step))
            folder.record(self.directory, folder.LATEST, step)
            if best is not None:
                folder.record(self.directory, folder.BEST, best)
            if limit is not None:
                folder.prune(self.directory, step, limit, best)

        role.once(publish)
        self.completed.append(step)

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:  # a full disk, for example
            reason = str(error)
            if isinstance(error, CheckpointException):  # of a shard; it hides the error's number
                reason = next((str(e) for e, _ in error.failures.values()), "another rank failed")
                free = shutil.disk_usage(self.directory).free
                reason += f" ({free / 2**30:.1f} GiB are free there)"
            raise FilesError(
                f"{self.directory}: the checkpoint of step {self.step} was not written: {reason}"
            ) from error


def load_checkpoint(policy: Policy, checkpoint: Path, reference: Reference | None = None) -> dict:
    """Loads a checkpoint, whose manifest was verified, into the policy, and into `reference`, which
    must have been saved too. Random generators are set where the layout is the one that was saved.

    Returns:
        The state given to `save`, with "step", the number of steps it had made, and "tensors".

    Raises:
        FilesError: when a file of it could run code.
    """
    role = policy.role
    role.once(lambda: check_pickles(checkpoint))
    state = _sharded_state(policy, reference, is_loading=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch, about what Megatron uses of it
        loaded = dist_checkpointing.load(state, str(checkpoint))
    for number, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded["model"][number])
    for number, chunk in enumerate(reference.chunks if reference else ()):
        chunk.load_state_dict(loaded["reference"][number])
    load_states(policy.optimizer, loaded["optimizer"], saved_parts=loaded["optimizers"])
    policy.scheduler.load_state_dict(loaded["scheduler"])
    policy.version = loaded["version"]
    state = json.loads((checkpoint / folder.STATE).read_text())
    if state.pop("layout") == str(role.layout):
        text = (checkpoint / f"random_{role.rank:05d}.json").read_text()
        restore_random_state(json.loads(text))
    tensors = checkpoint / folder.TENSORS
    return state | {"tensors": load_file(tensors) if tensors.exists() else {}}


def load_model_only(chunks: ModuleList, role: Role, checkpoint: Path) -> None:
    """Loads the model of a checkpoint, whose manifest was verified, into `chunks`.

    Raises:
        FilesError: when it holds adapters beside the model, or a file of it could run code.
    """
    config = role.once(lambda: yaml.safe_load((checkpoint / CONFIG).read_text()))
    if config.get("peft_config"):
        raise FilesError(
            f"{checkpoint}: holds adapters beside its model; give the directory of the model they "
            "are merged into (docs/trainers.md, Adapters)"
        )
    role.once(lambda: check_pickles(checkpoint))
    with _data_parallel_rank(role):
        model = _sharded_model(chunks, {"dp_cp_group": role.groups.dp_cp})
    loaded = dist_checkpointing.load({"model": model}, str(checkpoint))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded["model"][number])


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content))


def _sharded_state(policy: Policy, reference: Reference | None, is_loading: bool) -> dict:
    metadata = {"dp_cp_group": policy.role.groups.dp_cp}
    with _data_parallel_rank(policy.role):
        model = _sharded_model(policy.chunks, metadata)
        optimizer = sharded_states(policy.optimizer, model, is_loading, metadata)
        other = {"reference": _sharded_model(reference.chunks, metadata)} if reference else {}
    add_prefix_for_sharding(other, "reference.")
    return {
        "model": model,
        "optimizer": optimizer,
        "optimizers": len(optimizer),
        "scheduler": policy.scheduler.state_dict(),
        "version": policy.version,
        **other,
    }


def _sharded_model(chunks: ModuleList, metadata: dict) -> dict[int, dict]:
    return {
        number: chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)
    }


def _rank_that_wrote(name: str) -> int:
    match = _OF_RANK.match(name)
    return int(match[1]) if match else 0


class _Results:
    """How Megatron's forked writers report to this process. It stands in for Megatron's own queue,
    which is a process more for each rank, imports the user's script, and outlives a killed job."""

    def __init__(self):
        self.file = os.fdopen(os.memfd_create("results"), "w+b")

    def put(self, results) -> None:
        pickle.dump(results, self.file)
        self.file.flush()

    def get_nowait(self):
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError as error:  # the writer died
            raise queue.Empty from error


@contextmanager
def _data_parallel_rank(role: Role):
    """Megatron asks `parallel_state` for this rank when it shards a tied output layer."""
    parallel_state.set_data_parallel_rank(role.data_rank)
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(None)
