"""A model in a Megatron checkpoint, seen as the Hugging Face tensors it consists of."""

from pathlib import Path

import torch
from torch import Tensor

from grpo_mcore.checkpoint import folder, manifest
from grpo_mcore.checkpoint.folder import METADATA
from grpo_mcore.checkpoint.pickles import read_common
from grpo_mcore.checkpoint.torch_dist import TorchDistReader, checkpoint_slots
from grpo_mcore.errors import FilesError
from grpo_mcore.models.expected import stored_rules, whole_size
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.lora import SUFFIX
from grpo_mcore.models.rules import VocabRows


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one in it.

    Raises:
        FilesError: when there is none.
    """
    if (path / METADATA).is_file():
        return path
    latest = path / folder.LATEST
    if not latest.is_file():
        raise FilesError(f"{path}: no Megatron checkpoint: neither {latest.name} nor {METADATA}")
    newest = latest.read_text().strip()
    found = folder.checkpoint_at(path, int(newest)) if newest.isdigit() else path / newest
    if not (found / METADATA).is_file():
        raise FilesError(f"{path}: {latest.name} says {newest}, but {found.name} is not there")
    return found


def check_manifest(checkpoint: Path, with_checksums: bool) -> None:
    """Compares the files of `checkpoint` with its manifest, if it has one: Megatron-LM writes none.

    Raises:
        FilesError: naming the first file that is missing, truncated or (by checksum) altered.
    """
    if (checkpoint / manifest.NAME).is_file():
        entries = manifest.read_manifest(checkpoint)
        fault = entries
        if not isinstance(entries, str):
            fault = manifest.first_fault(checkpoint, entries, with_checksums)
        if fault:
            raise FilesError(f"{checkpoint}: {fault}")


class MegatronModel:
    """Reads the model of a checkpoint by Hugging Face names, as HFReader does, or by parameters.

    Args:
        directory: a checkpoint, with its companions.
        dtype: what tensors are read as; None: as they are stored.

    Attributes:
        rules: by the name of the parameter.
        expected: every Hugging Face tensor's shape and type, as a tensor without storage.

    Raises:
        FilesError: when the checkpoint is damaged, or its tensors are not what its config.json
            says; found out before any tensor is read.
    """

    def __init__(self, directory: Path, dtype: torch.dtype | None = None):
        self.directory, self.companions = directory, directory / folder.COMPANIONS
        check_manifest(directory, with_checksums=False)
        self.reader = TorchDistReader(directory, dtype)
        if any(f"{SUFFIX}." in key for key in self.reader.tensors):
            raise FilesError(
                f"{directory}: holds LoRA adapters beside its model, which the conversion would "
                "leave out; resume the run and have it write its model"
            )
        if not self.companions.is_dir():
            raise FilesError(
                f"{directory}: lacks the folder {folder.COMPANIONS}/ with config.json and tokenizer"
            )
        model = read_shape(folder.COMPANIONS, str(self.companions))
        self.rules = stored_rules(model)
        self.slots = checkpoint_slots(self.rules)
        self.sizes = {name: whole_size(name, model) for name in self.rules}
        self._check_sizes()
        self.expected: dict[str, Tensor] = {}
        self._parameter_of: dict[str, str] = {}
        for name, rule in self.rules.items():
            held = torch.empty(
                self.sizes[name], dtype=self.reader.dtype(self.slots[name]), device="meta"
            )
            parts = rule.merge([held])
            self.expected |= parts
            self._parameter_of |= dict.fromkeys(parts, name)
        self._merged: dict[str, Tensor] = {}

    @property
    def source(self) -> str:
        """The Hugging Face model it came from."""
        return read_common(self.directory).get("hf_model", "unknown")

    @property
    def names(self) -> list[str]:
        return list(self.expected)

    def shape(self, name: str) -> list[int]:
        return list(self.expected[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.expected[name].dtype

    def read(self, name: str) -> Tensor:
        """The Hugging Face tensor `name`. The other parts of its parameter are held until they, or
        a part of another, are asked for."""
        if name not in self._merged:
            self._merged.clear()
            parameter = self._parameter_of[name]
            self._merged |= self.rules[parameter].merge([self.parameter(parameter)])
        return self._merged.pop(name)

    def parameter(self, name: str) -> Tensor:
        """The Megatron parameter `name`, whole, without padding."""
        return self.reader.read(self.slots[name], self.sizes[name])

    def _check_sizes(self) -> None:
        for name, size in self.sizes.items():
            found = self.reader.size(self.slots[name])
            padded = isinstance(self.rules[name], VocabRows) and found[0] >= size[0]
            if found[padded:] != size[padded:]:
                raise FilesError(
                    f"{self.directory}: {name} is {list(found)}; by config.json it is {list(size)}"
                )
