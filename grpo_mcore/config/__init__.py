"""The dataclass tree: one schema for the Python API, YAML files and the command line.

Imports neither torch nor vLLM."""

from grpo_mcore.config.errors import ConfigError
from grpo_mcore.config.schema import (
    DataConfig,
    LayoutConfig,
    ModelConfig,
    RolloutConfig,
    SFTConfig,
    TeacherGRPOConfig,
    TemplatesConfig,
    TrainingConfig,
)

__all__ = [
    "ConfigError",
    "DataConfig",
    "LayoutConfig",
    "ModelConfig",
    "RolloutConfig",
    "SFTConfig",
    "TeacherGRPOConfig",
    "TemplatesConfig",
    "TrainingConfig",
]
