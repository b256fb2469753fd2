"""What samples are worth."""

from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.config import GroupConfig
from grpo_mcore.objectives.advantages import groups_without_spread, sum_rewards
from grpo_mcore.parallel.groups import Role
from grpo_mcore.report.phases import Phases
from grpo_mcore.rewards import (
    RewardCall,
    RewardSpec,
    Scores,
    group_metrics,
    reward_metrics,
    score,
)
from grpo_mcore.rollout.samples import Rollouts, length_metrics


class Scoring:
    """Every method is called by all ranks of the trained model's role."""

    def __init__(
        self,
        rewards: list[RewardSpec],
        config: GroupConfig,
        role: Role,
        phases: Phases,
        runner: CallbackRunner,
    ):
        self.rewards, self.config, self.role = rewards, config, role
        self.phases, self.runner = phases, runner

    def __call__(self, rollouts: Rollouts, step: int) -> Scores:
        """Each sample's rewards, computed once and shared by all ranks.

        Args:
            step: from 1; reward functions may ask for it.
        """
        call = RewardCall(
            step,
            rollouts.prompts,
            rollouts.completions,
            [sample.tokens for sample in rollouts.samples],
            rollouts.columns,
            self.runner.state,
        )
        timeout = self.config.reward_timeout
        with self.phases("reward"):
            return self.role.once(lambda: score(self.rewards, call, timeout))

    def sum(self, scores: Scores) -> Tensor:
        """[samples], each function weighed."""
        return sum_rewards(scores.rewards, self.config.reward_weights)

    def has_spread(self, scores: Scores) -> Tensor:
        """[groups], False where all samples are rewarded the same."""
        return ~groups_without_spread(self.sum(scores), self.config.num_generations)

    def describe(self, rollouts: Rollouts, scores: Scores, copies: int) -> dict[str, float]:
        """Metrics of scored samples, `copies` of each prompt, under TRL's names."""
        return (
            group_metrics(self.sum(scores), copies)
            | length_metrics(rollouts.samples)
            | reward_metrics(self.rewards, scores.rewards)
            | {name: sum(values) / len(values) for name, values in scores.metrics.items()}
            | rollouts.metrics
        )
