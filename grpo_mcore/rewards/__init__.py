"""Reward functions and the checks on what they return. Knows nothing of torch.distributed."""

from grpo_mcore.rewards.adaptive import AdaptiveTeachingReward
from grpo_mcore.rewards.call import RewardError, call_rewards

__all__ = ["AdaptiveTeachingReward", "RewardError", "call_rewards"]
