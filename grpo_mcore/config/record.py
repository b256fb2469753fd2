"""The file that says how a run was configured."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from grpo_mcore.config.trainers import TrainingConfig

CONFIG = "config.yaml"


def write_config(directory: Path, config: TrainingConfig) -> None:
    """Writes the whole configuration to `directory`."""
    # A setting may be a Path, or one of transformers' enumerations, which are texts as well.
    plain = json.loads(json.dumps(asdict(config), default=str))
    (directory / CONFIG).write_text(yaml.safe_dump(plain, sort_keys=False))
