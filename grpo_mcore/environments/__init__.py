"""Rollouts of many turns, in which tools and environments answer the model.

Knows nothing of Megatron, torch.distributed or vLLM."""

from grpo_mcore.environments.conversation import Conversation, conversation_metrics
from grpo_mcore.environments.environment import (
    Environment,
    EnvironmentFailure,
    EnvironmentSpec,
    StepResult,
    check_environment,
)
from grpo_mcore.environments.tools import check_tools
from grpo_mcore.environments.turns import run_turns

__all__ = [
    "Conversation",
    "Environment",
    "EnvironmentFailure",
    "EnvironmentSpec",
    "StepResult",
    "check_environment",
    "check_tools",
    "conversation_metrics",
    "run_turns",
]
