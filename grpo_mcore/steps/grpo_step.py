"""The steps of GRPO."""

from collections import Counter
from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import Tensor

from grpo_mcore.callbacks import CallbackRunner
from grpo_mcore.checkpoint.random_state import random_state, restore_random_state
from grpo_mcore.checkpoint.start import Start
from grpo_mcore.config import GroupConfig
from grpo_mcore.preflight.job import Job
from grpo_mcore.rewards import Scores
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.samples import Rollouts
from grpo_mcore.steps.generations import Generations
from grpo_mcore.steps.loop import Loop
from grpo_mcore.steps.policy_engines import PolicyEngines
from grpo_mcore.steps.sampler import Sampler
from grpo_mcore.steps.scoring import Scoring
from grpo_mcore.steps.session import Session
from grpo_mcore.steps.update import GRPOUpdate
from grpo_mcore.steps.verdict import HandOver, MismatchLimits, verdict
from grpo_mcore.training.batch import Batch
from grpo_mcore.training.policy import BaseReference, Policy, Reference


class GRPOSession(Session):
    """A sampler's samples are scored, the policy learns from them, and its engines follow.

    Attributes:
        step: the newest, counted from 1.
    """

    def __init__(
        self,
        config: GroupConfig,
        job: Job,
        policy: Policy,
        reference: Reference | BaseReference | None,
        sampler: Sampler,
        scoring: Scoring,
        engines: PolicyEngines,
        start: Start,
        runner: CallbackRunner,
        samples_from_reference: bool = False,
    ):
        """Loads the checkpoint of `start` and gives the engines the weights.

        Args:
            samples_from_reference: engines are given the reference, and not the policy.
        """
        self.config, self.job, self.runner = config, job, runner
        self.policy, self.shape, self.role = policy, policy.shape, policy.role
        self.sampler, self.scoring, self.engines = sampler, scoring, engines
        self.phases, self.evaluates, self.step = engines.phases, sampler.evaluates, 0
        self.generations = Generations(config, job.train_size, self.role, policy.length_multiple)
        self.cycle = self.generations.cycle
        self.update = GRPOUpdate(policy, reference, config, self.cycle)
        self.loop = Loop(
            config,
            policy,
            start,
            sampler.shown,
            runner,
            reference if config.sync_ref_model else None,
            job.steps_per_epoch,
        )
        self.limits, note = MismatchLimits.of(config, samples_from_reference)
        if note:
            self.loop.say(note)
        self.sampled_by: list[HandOver] = []
        """What sampled the newest step's."""
        saved = self.loop.restored
        self.update.entropy.restore(saved.get("entropy"))
        self.generations.restore(saved)
        sampler.restore(saved)
        engines.follow(policy, reference.chunks if samples_from_reference else None)
        self.loop.say(job.describe())

    def train_step(self, step: int) -> dict[str, float]:
        go_back = self.boundary()
        try:
            return self._train_step(step)
        except EngineError:
            go_back()
            raise

    def _train_step(self, step: int) -> dict[str, float]:
        self.step, parts, metrics = step + 1, self.cycle.parts(step), {}
        with self.phases("step"):
            if lacking := self.generations.lacking(parts):
                metrics |= self.generate(lacking)
            with self.phases("update"):
                metrics |= self.update(self.generations.rows(parts))
            self.sampled_by = self.generations.sampled_by(parts)
            self.generations.drop_used(step)
            self.update.move_reference(self.step)
            self.sync_engines()
        metrics |= self.engines.take_sent()
        kl, mismatch = metrics.get("kl"), metrics.get("sampling/mismatch")
        self.runner.current_kl = None if kl is None else torch.tensor([kl])
        metrics |= {"sampling/mismatch_warning": float(self.limits.is_high(mismatch))}
        metrics |= self.phases.take()
        return metrics | self.sampler.step_ended(metrics)

    def generate(self, numbers: list[int]) -> dict[str, float]:
        """Samples and scores these generations (from 0) of the run. Returns the metrics of them
        all."""
        sampled, counts = [], Counter()
        for number in numbers:
            rollouts, scores, found = self.sample(number)
            self.look_ahead(number + 1)
            batch = self.batch_of(rollouts, scores)
            self.generations.hold(number, batch, self.engines.hand_over())
            sampled.append((rollouts, scores))
            counts.update(found)
        rollouts, scores = (reduce(add, kind) for kind in zip(*sampled, strict=True))
        rewards = self.scoring.sum(scores)
        self.runner.current_rewards = rewards
        if self.loop.progress:
            self.sampler.record(self.loop.progress, self.step, rollouts, scores, rewards)
        metrics = self.scoring.describe(rollouts, scores, self.config.num_generations)
        metrics |= self.sampler.describe(rollouts, metrics)
        return dict(counts) | metrics | {"num_tokens": self.generations.num_tokens}

    def sample(self, generation: int) -> tuple[Rollouts, Scores, dict[str, float]]:
        """Scored samples of the next prompts; with dynamic sampling, of further ones in place of
        those whose samples are all rewarded the same (arXiv:2503.14476)."""
        config, key = self.config, _key(generation)
        wanted = self.generations.prompts
        rollouts, scores = self._sample(wanted, key)
        if not config.use_dynamic_sampling:
            return rollouts, scores, {}
        tried = 1
        while tried < config.dynamic_sampling_max_gen_batches:
            lacking = wanted - int(self.scoring.has_spread(scores).sum())
            if lacking <= 0:
                break
            more, theirs = self._sample(lacking, f"{key}/{tried}")
            rollouts, scores = rollouts + more, scores + theirs
            tried += 1
        flat = (~self.scoring.has_spread(scores)).tolist()
        # Those with spread, and as many others as are wanted to make the batch whole.
        groups = sorted(range(len(flat)), key=flat.__getitem__)[:wanted]
        each = config.num_generations
        rows = [group * each + place for group in sorted(groups) for place in range(each)]
        counts = {
            "dynamic_sampling/batches": tried,
            "dynamic_sampling/replaced": len(flat) - wanted,
        }
        return rollouts.rows(rows), scores.rows(rows), counts

    def _sample(self, prompts: int, key: str) -> tuple[Rollouts, Scores]:
        rollouts = self.sampler.roll_out(self.generations.take_rows(prompts), key)
        return rollouts, self.scoring(rollouts, self.step)

    def look_ahead(self, generation: int) -> None:
        if self.cycle.first_step(generation) < self.config.max_steps:
            numbers = self.generations.next_rows(self.generations.prompts)
            self.sampler.look_ahead(numbers, _key(generation))

    def batch_of(self, rollouts: Rollouts, scores: Scores) -> Batch:
        """All that updates want to know of scored samples."""
        with self.phases("reward"):
            batch = self.update.make_batch(rollouts.samples)
        with self.phases("reference"):
            self.update.add_log_probs(batch)
        self.update.add_advantages(batch, scores.rewards)
        return batch

    def sync_engines(self) -> None:
        """Unless samples are left. Where the policy makes room for its engines, they are given the
        weights when they next generate."""
        if not (self.generations.held or self.engines.makes_room):
            warning = self.engines.update_after_step()
            if warning:
                self.loop.say(warning)

    def step_recorded(self, step: int, metrics: dict[str, float]) -> None:
        """Says what the step's samples prove of the hand-over of weights.

        Raises:
            MismatchError: when trainer and engines disagree by more than the run allows.
        """
        mismatch = metrics.get("sampling/mismatch")
        is_high = bool(metrics["sampling/mismatch_warning"])
        self.loop.say(verdict(self.sampled_by, mismatch, is_high))
        if warning := self.limits.judge(step, mismatch):
            self.loop.say(warning)

    def evaluate(self, datasets: dict | None = None) -> dict[str, float]:
        return self.sampler.evaluate(datasets, self.step)

    def boundary(self) -> Callable[[], None]:
        """What takes the session back to where it is now, before a step, from within that step's
        sampling."""
        parts = self.generations.boundary(), self.sampler.boundary()
        state = random_state()

        def go_back() -> None:
            for part in parts:
                part()
            self.phases.take()
            restore_random_state(state)

        return go_back

    def state(self) -> dict:
        entropy = {"entropy": self.update.entropy.state()}
        return entropy | self.generations.state() | self.sampler.state()

    def tensors(self) -> dict[str, Tensor]:
        return self.generations.tensors()

    def run_ended(self) -> None:
        """
        Raises:
            SyncError: when the last step's weights differ in the engines, which nobody needed.
        """
        if self.loop.progress and (line := self.sampler.run_ended(self.loop.directory)):
            self.loop.say(line)
        self.engines.check_last_sync()

    def rest(self) -> None:
        self.sampler.rest()


def _key(generation: int) -> str:
    """What seeds a generation's samples."""
    return f"step {generation}"
