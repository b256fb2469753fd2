"""One update of a policy on scored samples: GRPO's batch, what its options want to know of it, the
loss, the optimizer step."""

import torch
from torch import Tensor

from grpo_mcore.config import TeacherGRPOConfig
from grpo_mcore.objectives.advantages import compute_advantages
from grpo_mcore.objectives.agreement import agreement
from grpo_mcore.objectives.correction import correction_metrics, rollout_correction
from grpo_mcore.objectives.entropy import EntropyController, entropy_bonus, high_entropy_mask
from grpo_mcore.objectives.grpo import grpo_loss
from grpo_mcore.objectives.kl import kl_penalty
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.objectives.weights import equal_weights, mask_truncated, token_weights
from grpo_mcore.rollout.requests import Completion
from grpo_mcore.training.batch import Batch, align, pad_batch
from grpo_mcore.training.policy import Policy, Reference


class GRPOUpdate:
    """Makes samples into updates of `policy`. Every method is called by all ranks of its role, with
    the same arguments.

    Attributes:
        entropy: the entropy bonus's coefficient, which may adapt.
    """

    def __init__(self, policy: Policy, reference: Reference | None, config: TeacherGRPOConfig):
        self.policy, self.reference, self.config = policy, reference, config
        self.entropy = EntropyController(config)

    def make_batch(self, prompts: list[list[int]], completions: list[Completion]) -> Batch:
        """The samples of an update as tensors."""
        batch = pad_batch(prompts, [c.tokens for c in completions], self.policy.length_multiple)
        sampled = batch["mask"]
        batch["rollout"] = align([c.log_probs for c in completions], sampled)
        if self.config.mask_truncated_completions:
            finished = torch.tensor([c.finished for c in completions])
            batch["mask"] = mask_truncated(sampled, finished)
        return batch

    def add_reference(self, batch: Batch) -> None:
        """Adds the reference's log-probabilities; on the last stage, which alone uses them."""
        if self.reference:
            batch["reference"] = self.reference.log_probs(batch, self.config.temperature)

    def __call__(self, batch: Batch, rewards_per_func: Tensor) -> dict[str, float]:
        """One optimizer step.

        Args:
            batch: from `make_batch`, with the reference's log-probabilities if there is one.
            rewards_per_func: [samples, functions], NaN where there is none.

        Returns:
            The update's metrics, on every rank.
        """
        config, mask = self.config, batch["mask"]
        penalties = None
        if config.use_kl_in_reward or config.top_entropy_quantile < 1:
            log_probs, entropies = self.policy.log_probs(batch, config.temperature)
            if config.use_kl_in_reward:
                penalties = kl_penalty(
                    log_probs, batch["reference"], mask, config.beta, config.kl_estimator
                )
            if config.top_entropy_quantile < 1:
                batch["entropy_mask"] = high_entropy_mask(
                    entropies, mask, config.top_entropy_quantile
                )
        batch["advantages"] = compute_advantages(
            rewards_per_func,
            config.num_generations,
            config.scale_rewards,
            config.multi_objective_aggregation,
            config.reward_weights,
            config.advantage_estimator,
            penalties,
        )
        batch["weights"] = token_weights(mask, config.loss_type, config.max_completion_length)
        batch["entropy_weights"] = equal_weights(batch.get("entropy_mask", mask))
        metrics = self.policy.compute_gradients(batch, self._loss, config.temperature)
        if config.entropy_coef or config.use_adaptive_entropy:
            metrics["entropy_coef"] = self.entropy.applied
            self.entropy.update(metrics.get("entropy/bonus", metrics["entropy"]))
        return metrics | self.policy.step() | {"num_tokens": mask.sum().item()}

    def _loss(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask, sampling = self.config, part["mask"], part["rollout"]
        # There is one update a batch, so the policy that is asked now is the one before it.
        before = log_probs.detach()
        ratio, more = None, {}
        if config.vllm_importance_sampling_correction:
            ratio = rollout_correction(
                before,
                sampling,
                mask,
                config.vllm_importance_sampling_mode,
                config.vllm_importance_sampling_clip_min,
                config.vllm_importance_sampling_clip_max,
            )
            more |= correction_metrics(ratio, before, sampling, mask)
        more |= agreement(before, sampling, mask)
        loss, metrics = grpo_loss(
            log_probs,
            part["advantages"],
            part["weights"],
            config,
            ref_log_probs=part.get("reference"),
            sampling_log_probs=sampling,
            importance_sampling_ratio=ratio,
            entropy_mask=part.get("entropy_mask"),
        )
        if config.entropy_coef or config.use_adaptive_entropy:
            loss = loss - entropy_bonus(entropy, part["entropy_weights"], self.entropy.applied)
            metrics["entropy/bonus"] = mean_of(entropy, part.get("entropy_mask", mask))
        return loss, metrics | {f"sampling/{name}": value for name, value in more.items()}
