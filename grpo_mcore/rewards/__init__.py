"""Reward functions, how they are called, and the checks on what they return. Knows nothing of
torch.distributed."""

from grpo_mcore.rewards.accuracy import accuracy_reward
from grpo_mcore.rewards.adaptive import AdaptiveTeachingReward, compute_teaching_reward
from grpo_mcore.rewards.call import (
    RewardCall,
    RewardError,
    Scores,
    score,
)
from grpo_mcore.rewards.grading import Grader
from grpo_mcore.rewards.leak import leak_penalty, leaks_answer
from grpo_mcore.rewards.likelihood_gain import LikelihoodGainReward
from grpo_mcore.rewards.metrics import group_metrics, reward_metrics
from grpo_mcore.rewards.model import RewardModel
from grpo_mcore.rewards.shape import (
    format_reward,
    get_length_penalty,
    get_soft_overlong_punishment,
    think_format_reward,
)
from grpo_mcore.rewards.specs import RewardSource, RewardSpec, as_reward_specs, listed, reward

__all__ = [
    "AdaptiveTeachingReward",
    "Grader",
    "LikelihoodGainReward",
    "RewardCall",
    "RewardError",
    "RewardModel",
    "RewardSource",
    "RewardSpec",
    "Scores",
    "accuracy_reward",
    "as_reward_specs",
    "compute_teaching_reward",
    "format_reward",
    "get_length_penalty",
    "get_soft_overlong_punishment",
    "group_metrics",
    "leak_penalty",
    "leaks_answer",
    "listed",
    "reward",
    "reward_metrics",
    "score",
    "think_format_reward",
]
