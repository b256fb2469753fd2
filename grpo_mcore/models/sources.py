"""Models as users name them, a directory, a hub id or an object, brought to a directory; and a
directory brought to the hub."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import nn

from grpo_mcore.data.tokenizer import saved_tokenizer
from grpo_mcore.errors import ConfigError, PhaseTimeout, one_line
from grpo_mcore.models.hf_files import COMPANIONS, INDEX, new_directory
from grpo_mcore.parallel.world import is_rank_zero

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel

WEIGHTS = ("model.safetensors", "model-*.safetensors", INDEX)
"""A repository may hold the same weights again, under other names or in folders."""
DEADLINE_SECONDS = 1800.0


def local_model(
    key: str, model: Any, directory: Path, revision: str | None = None, tokenizer=None
) -> str:
    """The local Hugging Face directory of the model that setting `key` gives. Every rank calls it
    with the same arguments, before torch.distributed is initialised.

    A model at the hub is taken from its cache, or downloaded there. A model object is saved, with
    its tokenizer, in a directory named by a hash of all that is saved: by rank 0, if it is not
    there from an earlier time, while the others wait for it. So nothing is ever written over, nor
    a model of other weights taken for this one.

    Args:
        model: a directory, a hub id, or a transformers.PreTrainedModel.
        directory: where objects are saved; made if need be. All nodes share it.
        revision: branch, tag or commit of a model at the hub.
        tokenizer: transformers' tokenizer of a model object; None: that of the model it was loaded
            from.

    Raises:
        ConfigError: naming `key`, for what is no model, or a model without its tokenizer.
        FilesError: when an object cannot be written.
        PhaseTimeout: when rank 0 has not written it in half an hour.
    """
    if isinstance(model, (str, Path)):
        return str(model) if Path(model).is_dir() else _download(key, model, revision)
    if getattr(model, "peft_config", None):
        raise ConfigError(
            f"{key}={type(model).__name__}: it has PEFT's adapters already; pass the base model, "
            "and their configuration as peft_config"
        )
    from transformers import PreTrainedModel  # takes seconds

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{key}={type(model).__name__}: give a model's directory, its id at the Hugging Face "
            "hub, or a transformers.PreTrainedModel"
        )
    return str(_save(key, model, tokenizer or _own_tokenizer(key, model), directory))


def push_folder(
    folder: Path,
    repo_id: str,
    commit_message: str = "End of training",
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    blocking: bool = True,
) -> "CommitInfo | Future[CommitInfo]":
    """Uploads all files of `folder` to the model repository `repo_id`, which is made if need be, as
    one commit. Files there with other names stay.

    Args:
        token: None: the one the user is logged in with.
        revision: a branch, made if need be; None: the main one.
        private: of a repository that is made; None: as the account has it.
        blocking: return when all is uploaded, and not a Future at once.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: when the hub refuses; a Future has it if it does so
            while uploading.
    """
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision:
        hub.create_branch(repo_id, branch=revision, exist_ok=True)
    return hub.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        run_as_future=not blocking,
    )


def _download(key: str, model: str | Path, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            str(model), revision=revision, allow_patterns=[*COMPANIONS, *WEIGHTS]
        )
    except Exception as error:  # hub, network and naming errors have no common type
        at = f" at revision {revision}" if revision else ""
        raise ConfigError(
            f"{key}={model}: no directory, and no model the Hugging Face hub gives{at} "
            f"({one_line(error)}); the path of a directory would do as well"
        ) from error


def _own_tokenizer(key: str, model: "PreTrainedModel"):
    name = model.config._name_or_path
    try:
        return saved_tokenizer(name)
    except ValueError as error:
        origin = f"came from {name}" if name else "was not loaded from anywhere"
        raise ConfigError(
            f"{key}={type(model).__name__}: no tokenizer ({error}): the model {origin}; pass "
            "processing_class"
        ) from error


def _save(key: str, model: "PreTrainedModel", tokenizer, directory: Path) -> Path:
    with TemporaryDirectory() as companions:
        tokenizer.save_pretrained(companions)
        name = f"{type(model).__name__}-{_fingerprint(model, Path(companions))}"
    final = Path(directory).resolve() / name
    if is_rank_zero() and not final.exists():
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        with new_directory(final, size) as work:
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not final.exists():
        if time.monotonic() > deadline:
            raise PhaseTimeout(
                f"{key}: waited {DEADLINE_SECONDS:.0f} s for rank 0 to write {final}; every rank "
                "needs the same model, and every node that directory"
            )
        time.sleep(0.2)
    return final


def _fingerprint(model: nn.Module, companions: Path) -> str:
    """A hash of the model's tensors and configuration and of the files in `companions`."""
    digest = xxhash.xxh3_128()
    for part in _parts(model, companions):
        digest.update(part)
    return digest.hexdigest()


def _parts(model: nn.Module, companions: Path) -> Iterator[bytes | np.ndarray]:
    yield model.config.to_json_string().encode()
    if model.generation_config:
        yield model.generation_config.to_json_string().encode()
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    for file in sorted(path for path in companions.rglob("*") if path.is_file()):
        yield str(file.relative_to(companions)).encode()
        yield file.read_bytes()
