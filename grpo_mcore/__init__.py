"""grpo_mcore: Ray-free GRPO on Megatron-Core with vLLM rollouts.

Importing the package is cheap; the trainers load torch, Megatron-Core and vLLM when first named.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

__version__ = "0.1.0"

_HOMES = {
    "GRPOConfig": "grpo_mcore.config",
    "GRPOTrainer": "grpo_mcore.trainers",
    "TeacherGRPOConfig": "grpo_mcore.config",
    "SFTConfig": "grpo_mcore.config",
    "TeacherGRPOTrainer": "grpo_mcore.trainers",
    "Tutor": "grpo_mcore.trainers.tutor",
    "DiagnosticResult": "grpo_mcore.teaching.diagnosis",
    "SFTTrainer": "grpo_mcore.trainers",
    "DPOConfig": "grpo_mcore.config",
    "DPOTrainer": "grpo_mcore.trainers",
    "BaseTrainer": "grpo_mcore.trainers.base",
    "Callback": "grpo_mcore.callbacks",
    "Environment": "grpo_mcore.environments",
    "LoraConfig": "grpo_mcore.config",
    "ModelConfig": "grpo_mcore.config",
    "TrainingResult": "grpo_mcore.report.result",
    "accuracy_reward": "grpo_mcore.rewards",
    "format_reward": "grpo_mcore.rewards",
    "reward": "grpo_mcore.rewards",
    "AdaptiveTeachingReward": "grpo_mcore.rewards",
    "RIMReward": "grpo_mcore.rewards.rim",
    "RewardSystemConfig": "grpo_mcore.config",
    "LikelihoodGainReward": "grpo_mcore.rewards",
}
__all__ = sorted(_HOMES)


class _BeforeMegatron(MetaPathFinder):
    """Readies this process for Megatron (`device.prepare`) when anyone first imports it, so that
    what does not need it, does not load it."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "megatron":
            import_module("grpo_mcore.device").prepare()


sys.meta_path.insert(0, _BeforeMegatron())


def __getattr__(name: str):
    if name == "api":
        return import_module("grpo_mcore.api")
    if name not in _HOMES:
        raise AttributeError(f"module 'grpo_mcore' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
