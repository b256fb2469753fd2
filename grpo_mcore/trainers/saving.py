"""Writes what was trained, where users want it."""

import shutil
import tempfile
from pathlib import Path

from grpo_mcore.models.hf_files import INDEX
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.adapters import export_adapters
from grpo_mcore.weights.export import export_model


def write_policy(policy: Policy, directory: Path, like: str, tokenizer=None) -> None:
    """Writes the model, or the adapters that were trained of it, in Hugging Face's format. What
    else is in `directory` stays. Collective over the policy's role.

    Args:
        like: the directory the model came from, whose configuration and tokenizer it keeps.
        tokenizer: a transformers tokenizer to write in place of that one.
    """
    role = policy.role
    is_new = role.once(lambda: not directory.exists())
    if is_new:
        _export(policy, directory, like, tokenizer)
        return

    def work_place() -> str:
        return tempfile.mkdtemp(prefix=".being-written-", dir=directory)

    work = Path(role.once(work_place))
    try:
        _export(policy, work / "model", like, tokenizer)
        role.once(lambda: _put_in(directory, work / "model", is_model=policy.lora is None))
    finally:
        if role.rank == 0:
            shutil.rmtree(work, ignore_errors=True)


def _export(policy: Policy, directory: Path, like: str, tokenizer) -> None:
    chunks, shape, role = policy.chunks, policy.shape, policy.role
    if policy.lora:
        export_adapters(chunks, shape, role, policy.lora, directory, like)
    else:
        export_model(chunks, shape, role, directory, like)
    if tokenizer is not None:
        role.once(lambda: tokenizer.save_pretrained(directory) and None)


def _put_in(directory: Path, written: Path, is_model: bool) -> None:
    """Moves the files in `written` to `directory`."""
    if is_model:  # an earlier model there may have had another number of files
        for old in (*directory.glob("model*.safetensors"), directory / INDEX):
            old.unlink(missing_ok=True)
    for file in written.iterdir():
        file.replace(directory / file.name)
