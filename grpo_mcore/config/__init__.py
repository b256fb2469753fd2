"""The dataclass tree: one schema for the Python API, YAML files and the command line.

Imports neither torch nor vLLM."""

from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.config.schema import (
    DataConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    SFTConfig,
    TeacherGRPOConfig,
    TemplatesConfig,
    TrainingConfig,
)
from grpo_mcore.errors import ConfigError

__all__ = [
    "ConfigError",
    "DataConfig",
    "LayoutConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RolloutConfig",
    "SFTConfig",
    "TeacherGRPOConfig",
    "TemplatesConfig",
    "TrainingConfig",
]
