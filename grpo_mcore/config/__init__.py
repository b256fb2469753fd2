"""The dataclass tree: one schema for the Python API, YAML files and the command line.

Imports neither torch nor vLLM."""

from grpo_mcore.config.objective import ObjectiveConfig
from grpo_mcore.config.reward_system import JudgeServerConfig, RewardSystemConfig
from grpo_mcore.config.sections import (
    DataConfig,
    LayoutConfig,
    LoraConfig,
    ModelConfig,
    RolloutConfig,
    TemplatesConfig,
)
from grpo_mcore.config.trainers import (
    DPOConfig,
    GroupConfig,
    GRPOConfig,
    SFTConfig,
    TeacherGRPOConfig,
    TeachingConfig,
    TrainingConfig,
    trained_model,
    trained_section,
)
from grpo_mcore.errors import ConfigError

__all__ = [
    "ConfigError",
    "DPOConfig",
    "DataConfig",
    "GRPOConfig",
    "GroupConfig",
    "JudgeServerConfig",
    "LayoutConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "RewardSystemConfig",
    "RolloutConfig",
    "SFTConfig",
    "TeacherGRPOConfig",
    "TeachingConfig",
    "TemplatesConfig",
    "TrainingConfig",
    "trained_model",
    "trained_section",
]
