"""Models where runs leave them: in a Hugging Face directory or in a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from torch.nn import ModuleList

from grpo_mcore.checkpoint import folder
from grpo_mcore.checkpoint.resume import find_checkpoint
from grpo_mcore.checkpoint.run import CONFIG, load_model_only
from grpo_mcore.config import ModelConfig
from grpo_mcore.models.build import build_model, load_weights
from grpo_mcore.models.expected import check_weights
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role


@dataclass(frozen=True)
class StoredModel:
    """
    Attributes:
        directory: of its configuration and tokenizer; also of its weights, unless they are in the
            `checkpoint`.
    """

    directory: str
    checkpoint: Path | None = None

    def load(self, shape: ModelShape, model: ModelConfig, role: Role, seed: int) -> ModuleList:
        """This rank's part of the model, as of `build_model`; `model.path` is `directory`."""
        chunks = build_model(shape, model, role, seed)
        if self.checkpoint:
            load_model_only(chunks, role, self.checkpoint)
        else:
            load_weights(chunks, shape, model, role)
        return chunks


def find_model(path: str) -> StoredModel:
    """The model in `path`: a checkpoint, a folder of them (the latest is meant) or a directory.

    Raises:
        ConfigError: for a checkpoint that is not whole.
    """
    if not _is_of_checkpoints(Path(path)):
        return StoredModel(path)
    checkpoint, _ = find_checkpoint(path, Path(path))
    return StoredModel(str(checkpoint / folder.COMPANIONS), checkpoint)


def check_stored(key: str, model: StoredModel) -> ModelShape:
    """The shape of `model`, the value of setting `key`, whose files are checked.

    Raises:
        ConfigError: for a directory that holds no model, or not all of it.
    """
    shape = read_shape(key, model.directory)
    if model.checkpoint is None:
        check_weights(key, model.directory, shape)
    return shape


def settings_of_run(path: str) -> dict | None:
    """The configuration of the run that made the model in `path`, a checkpoint, a folder of them,
    or the run's output_dir/final; None where there is none to be found."""
    place = Path(path)
    if not _is_of_checkpoints(place):
        place = place.parent / "checkpoints"
        if not _is_of_checkpoints(place):
            return None
    checkpoint, _ = find_checkpoint(str(place), place)
    return yaml.safe_load((checkpoint / CONFIG).read_text())


def _is_of_checkpoints(path: Path) -> bool:
    return folder.step_of(path) is not None or (path / folder.LATEST).is_file()
