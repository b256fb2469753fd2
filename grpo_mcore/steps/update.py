"""Updates of a policy on scored samples: GRPO's batch, what its options want to know of it, the
loss, the optimizer step, and the reference model, which may follow."""

from dataclasses import replace

import torch
from torch import Tensor

from grpo_mcore.config import GroupConfig, trained_model
from grpo_mcore.data.order import GenerationCycle
from grpo_mcore.objectives.advantages import compute_advantages
from grpo_mcore.objectives.agreement import agreement
from grpo_mcore.objectives.correction import correction_metrics, rollout_correction
from grpo_mcore.objectives.entropy import EntropyController, entropy_bonus, high_entropy_mask
from grpo_mcore.objectives.grpo import grpo_loss
from grpo_mcore.objectives.kl import kl_penalty
from grpo_mcore.objectives.metrics import mean_of
from grpo_mcore.objectives.weights import equal_weights, mask_truncated, token_weights
from grpo_mcore.rollout.samples import Sample
from grpo_mcore.training.batch import Batch, align, everywhere, pad_batch
from grpo_mcore.training.policy import BaseReference, Policy, Reference


def open_reference(
    policy: Policy, config: GroupConfig, path: str | None = None
) -> Reference | BaseReference | None:
    """The reference model of a run; None where its log-probabilities are not wanted.

    Args:
        path: its directory; None: that of the policy. With adapters it is then the policy without
            them.
    """
    if not config.beta:
        return None
    if config.peft_config and path is None:
        return BaseReference(policy)
    model = trained_model(config)
    return Reference(
        policy.role, policy.shape, model if path is None else replace(model, path=path), config
    )


class GRPOUpdate:
    """Makes samples into updates of `policy`. Every method is called by all ranks of its role, with
    the same arguments.

    Attributes:
        entropy: the entropy bonus's coefficient, which may adapt.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | BaseReference | None,
        config: GroupConfig,
        cycle: GenerationCycle,
    ):
        self.policy, self.reference, self.config = policy, reference, config
        accumulation = cycle.gradient_accumulation_steps
        self.updates_per_generation = cycle.steps_per_generation / accumulation
        # Whether the policy stands still while a generation is used.
        self.is_on_policy = accumulation % cycle.micro_steps == 0
        self.entropy = EntropyController(config)

    def make_batch(self, samples: list[Sample]) -> Batch:
        """The samples of a generation as tensors."""
        batch = pad_batch(
            [s.prompt for s in samples], [s.tokens for s in samples], self.policy.length_multiple
        )
        sampled = batch["mask"]
        batch["rollout"] = align([s.log_probs for s in samples], sampled)
        if any(s.mask is not None for s in samples):
            batch["mask"] = align([s.mask or [1] * len(s.tokens) for s in samples], sampled)
        if self.config.mask_truncated_completions:
            finished = torch.tensor([s.finished for s in samples])
            batch["mask"] = mask_truncated(batch["mask"], finished)
        tokens = batch["mask"].double().sum() / self.updates_per_generation
        batch["tokens_per_update"] = tokens.expand(len(samples)).clone()
        return batch

    def add_log_probs(self, batch: Batch) -> None:
        """Adds those of the reference, and those of the policy before the generation's updates
        where they are not those of the update itself."""
        config = self.config
        if self.reference:
            batch["reference"] = self.reference.log_probs(batch, config.temperature)
        if config.use_kl_in_reward or not self.is_on_policy:
            batch["old"], _ = self.policy.log_probs(batch, config.temperature)

    def add_advantages(self, batch: Batch, rewards_per_func: Tensor) -> None:
        """
        Args:
            rewards_per_func: [samples, functions], NaN where there is none.
        """
        config, penalties = self.config, None
        if config.use_kl_in_reward:
            whole = everywhere(batch, self.policy.role)
            penalties = kl_penalty(
                whole["old"], whole["reference"], whole["mask"], config.beta, config.kl_estimator
            )
            if self.is_on_policy:  # the update's own are the same, and have the gradient
                del batch["old"]
        batch["advantages"] = compute_advantages(
            rewards_per_func,
            config.num_generations,
            config.scale_rewards,
            config.multi_objective_aggregation,
            config.reward_weights,
            config.advantage_estimator,
            penalties,
        )

    def move_reference(self, done: int) -> None:
        """Moves the reference towards the policy, if that is due after `done` steps (TR-DPO,
        arXiv:2404.09656)."""
        config = self.config
        if config.sync_ref_model and done % config.ref_model_sync_steps == 0:
            self.reference.mix(self.policy, config.ref_model_mixup_alpha)

    def __call__(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on a whole generation, or on rows of it (or of several).

        Returns:
            The update's metrics, on every rank.
        """
        self.weigh(batch)
        config = self.config
        metrics = self.policy.compute_gradients(batch, self.loss, config.temperature)
        if config.entropy_coef or config.use_adaptive_entropy:
            metrics["entropy_coef"] = self.entropy.applied
            self.entropy.update(metrics.get("entropy/bonus", metrics["entropy"]))
        return metrics | self.policy.step()

    def value(self, batch: Batch) -> float:
        """The loss of an update on the batch."""
        self.weigh(batch)

        def loss(log_probs: Tensor, entropy: Tensor, part: Batch) -> tuple[Tensor, dict]:
            share, _ = self.loss(log_probs, entropy, part)
            return share, {"loss": share}

        return self.policy.measure([batch], loss, self.config.temperature)["loss"]

    def weigh(self, batch: Batch) -> None:
        """Adds what each token weighs in the update."""
        config, mask = self.config, batch["mask"]
        if config.top_entropy_quantile < 1:
            _, entropies = self.policy.log_probs(batch, config.temperature)
            batch["entropy_mask"] = high_entropy_mask(entropies, mask, config.top_entropy_quantile)
        batch["weights"] = token_weights(
            mask, config.loss_type, config.max_completion_length, batch["tokens_per_update"]
        )
        batch["entropy_weights"] = equal_weights(batch.get("entropy_mask", mask))

    def loss(
        self, log_probs: Tensor, entropy: Tensor, part: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the update's loss, and its metrics (`training.policy.Loss`)."""
        config, mask, sampling = self.config, part["mask"], part["rollout"]
        old = part.get("old")
        before = log_probs.detach() if old is None else old
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
            old_log_probs=old,
            ref_log_probs=part.get("reference"),
            sampling_log_probs=sampling,
            importance_sampling_ratio=ratio,
            entropy_mask=part.get("entropy_mask"),
        )
        if config.entropy_coef or config.use_adaptive_entropy:
            loss = loss - entropy_bonus(entropy, part["entropy_weights"], self.entropy.applied)
            metrics["entropy/bonus"] = mean_of(entropy, part.get("entropy_mask", mask))
        return loss, metrics | {f"sampling/{name}": value for name, value in more.items()}
