"""Rewards by interpretation: models judge each teaching, several at once and in two tiers."""

from grpo_mcore.rewards.rim.endpoint import Endpoint
from grpo_mcore.rewards.rim.reward import RIMEvaluation, RIMReward, asking_own_judge

__all__ = ["Endpoint", "RIMEvaluation", "RIMReward", "asking_own_judge"]
