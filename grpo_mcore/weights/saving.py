"""Writes what was trained, where users want it."""

import shutil
import tempfile
from pathlib import Path

from grpo_mcore.config.lora import ADAPTER_CONFIG
from grpo_mcore.errors import ConfigError
from grpo_mcore.models.hf_files import INDEX, SINGLE
from grpo_mcore.training.policy import Policy
from grpo_mcore.weights.adapters import export_adapters
from grpo_mcore.weights.export import export_model

SHARDS = "model-?????-of-?????.safetensors"


def write_policy(policy: Policy, directory: Path, like: str, tokenizer=None) -> None:
    """Writes the model, or the adapters that were trained of it, in Hugging Face's format. What
    else is in `directory` stays. Collective over the policy's role.

    Args:
        like: the directory the model came from, whose configuration and tokenizer it keeps.
        tokenizer: a transformers tokenizer to write in place of that one.

    Raises:
        FilesError: when it cannot be written.
        ConfigError: when it would be taken for the base of adapters there.
    """
    role = policy.role
    is_new = role.once(lambda: not directory.exists())
    if not policy.lora and role.once(lambda: (directory / ADAPTER_CONFIG).exists()):
        raise ConfigError(
            f"{directory}: holds adapters, which transformers would add to a model beside them; "
            "choose another directory"
        )
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
    """Moves the files in `written` to `directory`, and then removes what an earlier model there has
    left of its weights."""
    names = [file.relative_to(written) for file in written.rglob("*") if file.is_file()]
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).replace(directory / name)
    if is_model:
        weights = {SINGLE, INDEX} | {f.name for f in directory.glob(SHARDS)}
        for stale in weights - {str(name) for name in names}:
            (directory / stale).unlink(missing_ok=True)
