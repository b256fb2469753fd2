"""The steps of GRPO: samples, their rewards, updates, and the engines that follow."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import ModuleList
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from grpo_mcore.checkpoint.random_state import random_state, restore_random_state
from grpo_mcore.config import ConfigError
from grpo_mcore.data.chat import Text, is_conversation
from grpo_mcore.data.order import Order
from grpo_mcore.data.prompts import Prompt
from grpo_mcore.data.sources import Rows
from grpo_mcore.environments import conversation_metrics, run_turns
from grpo_mcore.objectives.advantages import groups_without_spread, sum_rewards
from grpo_mcore.parallel.world import World
from grpo_mcore.report.phases import Phases
from grpo_mcore.rewards import (
    RewardCall,
    Scores,
    group_metrics,
    reward_metrics,
    score,
)
from grpo_mcore.rewards.specs import GROUND_TRUTHS
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion, Request, request_seed
from grpo_mcore.rollout.samples import Rollouts, Sample, length_metrics
from grpo_mcore.trainers.base import Session, of_dataset
from grpo_mcore.trainers.batches import generation_cycle, prompts_per_generation
from grpo_mcore.trainers.grpo_update import OF_LAST_STAGE, GRPOUpdate
from grpo_mcore.trainers.handover import HandOver, MismatchLimits, verdict, why_incomparable
from grpo_mcore.trainers.loop import Loop, Start, trained_model
from grpo_mcore.trainers.users_rollout import sample_by_function
from grpo_mcore.training.batch import Batch, align, pad_batch
from grpo_mcore.training.policy import BaseReference, Policy, Reference
from grpo_mcore.weights.sync import SyncError, WeightSync

if TYPE_CHECKING:
    from grpo_mcore.trainers.grpo import GRPOTrainer

SHOWN = {
    "reward": "reward {:+.3f}",
    "reward_std": "+- {:.3f}",
    "kl": "kl {:.4f}",
    "grad_norm": "grad {:.2f}",
    "completions/mean_length": "tokens {:.1f}",
    "time/step": "{:.1f} s",
    "eval_reward": "reward {:+.3f}",
}


ENVIRONMENT_REWARD = "environment_reward"
"""The column of an environment's own rewards."""
TRL_LOG_PROBS = {
    "ref_per_token_logps": "reference",
    "old_per_token_logps": "old",
    "sampling_per_token_logps": "rollout",
}
"""TRL's name of log-probabilities -> theirs in a batch."""


class GRPOSession(Session):
    """The steps of GRPO. Samples come from this role's own engines."""

    def __init__(self, trainer: "GRPOTrainer", world: World, pool: RolloutPool, start: Start):
        self.trainer, self.config, self.job = trainer, trainer.args, trainer.job
        self.pool = pool
        self.role = pool.role
        self.model, self.tokenizer = trained_model(self.config), self.job.tokenizer
        self.shape = self.job.shape
        config, data_ranks = self.config, self.role.layout.data
        self.phases = Phases()
        self.cycle = generation_cycle(config)
        self.prompts_per_generation = prompts_per_generation(config, data_ranks)
        self.order = Order(self.job.train_size, 1, config.seed, config.shuffle_dataset)
        self.num_tokens = 0
        """Of all prompts and completions so far."""
        self.cursor = 0
        """Rows of the dataset taken so far, in their order."""
        self.held: dict[int, Batch] = {}
        """Generations that are not used up."""
        self.hand_overs: dict[int, HandOver] = {}
        """What sampled each of them."""
        self.sampled_by: list[HandOver] = []
        """What sampled the newest step's."""
        self.training_span = (0.0, 0.0)
        self.step = 0
        """The newest, counted from 1."""

        self.policy = Policy(
            self.role, self.shape, self.model, config, config.peft_config, trainer.lr_lambda
        )
        self.reference = self._reference()
        self.update = GRPOUpdate(self.policy, self.reference, config, self.cycle)
        self.loop = Loop(
            config,
            self.role,
            self.policy,
            start,
            self.shown(),
            trainer.runner,
            self.reference if config.sync_ref_model else None,
            self.job.steps_per_epoch,
        )
        self.mismatch_limits = self._mismatch_limits()
        self._restore(self.loop.restored)
        pool.wait_until_ready()
        self.sync = WeightSync(
            self.sampled_model(),
            self.shape,
            self.role,
            pool,
            config.rollout.bucket_megabytes,
            config.peft_config if config.rollout.lora_sync == "adapters" else None,
        )
        pool.refill, pool.make_room = self._refill, self.policy.away
        self.tensors_sent = 0
        """By the newest sync."""
        self.synced_version = -1
        """That the engines were proven to hold when last asked; those that sleep hold none."""
        self.difference: SyncError | None = None
        """What the sync that ended a step has found."""
        self.sent: dict[str, float] = {}
        """What a step's sync has moved, until the step's record has it."""
        self.sync_engines()
        self.loop.say(self.job.describe())

    def sampled_model(self) -> ModuleList:
        """The shards of the model whose samples are trained on."""
        return self.policy.chunks

    def shown(self) -> dict[str, str]:
        """What the lines on the terminal show (`report.progress.Progress`)."""
        return SHOWN

    @property
    def evaluates(self) -> bool:
        return bool(self.job.evals)

    def train_step(self, step: int) -> dict[str, float]:
        """
        Raises:
            EngineError: when engines cannot be kept alive; what the step has changed is undone.
        """
        go_back = self.boundary()
        try:
            return self._train_step(step)
        except EngineError:
            go_back()
            raise

    def boundary(self) -> Callable[[], None]:
        """What takes the session back to where it is now, before a step, from within that step's
        sampling."""
        cursor, num_tokens, held = self.cursor, self.num_tokens, dict(self.held)
        state = random_state()

        def go_back() -> None:
            self.cursor, self.num_tokens, self.held = cursor, num_tokens, held
            self.phases.take()
            restore_random_state(state)

        return go_back

    def _train_step(self, step: int) -> dict[str, float]:
        self.step, phases, metrics = step + 1, self.phases, {}
        with phases("step"):
            parts = self.cycle.parts(step)
            lacking = {generation for generation, _ in parts} - self.held.keys()
            if lacking:
                metrics |= self.generate(sorted(lacking))
            with phases("update"):
                metrics |= self.update(self._rows_of(parts))
            self.sampled_by = [self.hand_overs[generation] for generation, _ in parts]
            self._drop_used(step)
            self._move_reference(step + 1)
            # What comes next is sampled by this policy, which may have to make room first.
            if not (self.held or self.config.rollout.offload_policy):
                with phases("sync"):
                    self._try_to_sync()
        metrics, self.sent = metrics | self.sent, {}
        self.training_span = (self.training_span[0], time.time())
        kl = metrics.get("kl")
        self.trainer.current_kl = None if kl is None else torch.tensor([kl])
        is_high = self.mismatch_limits.is_high(metrics.get("sampling/mismatch"))
        return metrics | {"sampling/mismatch_warning": float(is_high)} | phases.take()

    def step_recorded(self, step: int, metrics: dict[str, float]) -> None:
        """Says what the step's samples prove of the hand-over of weights.

        Raises:
            MismatchError: when trainer and engines disagree by more than the run allows.
        """
        mismatch = metrics.get("sampling/mismatch")
        is_high = bool(metrics["sampling/mismatch_warning"])
        self.loop.say(verdict(self.sampled_by, mismatch, is_high))
        if warning := self.mismatch_limits.judge(step, mismatch):
            self.loop.say(warning)

    def generate(self, generations: list[int]) -> dict[str, float]:
        """Samples and scores what these generations (from 0) of the run hold. Returns the metrics
        of them all."""
        sampled, counts = [], Counter()
        for generation in generations:
            rollouts, scores, found = self.sample(generation)
            self.training_span = (time.time(), 0.0)
            self.hand_overs[generation] = HandOver(
                self.synced_version, self.policy.version, self.tensors_sent
            )
            self.held[generation] = batch = self.batch_of(rollouts, scores)
            self.num_tokens += int(batch["lengths"].sum())
            sampled.append((rollouts, scores))
            counts.update(found)
        rollouts, scores = (reduce(add, kind) for kind in zip(*sampled, strict=True))
        rewards = sum_rewards(scores.rewards, self.config.reward_weights)
        self.trainer.current_rewards = rewards
        self.log_completions(rollouts, scores, rewards)
        measured = self.describe(rollouts, scores, self.config.num_generations)
        return dict(counts) | measured | {"num_tokens": self.num_tokens}

    def batch_of(self, rollouts: Rollouts, scores: Scores) -> Batch:
        """All that updates want to know of scored samples."""
        with self.phases("reward"):
            batch = self.update.make_batch(rollouts.samples)
        with self.phases("reference"):
            self.update.add_log_probs(batch)
        self.update.add_advantages(batch, scores.rewards)
        return batch

    def sample(self, generation: int) -> tuple[Rollouts, Scores, dict[str, float]]:
        """Scored samples of the next prompts; with dynamic sampling, of further ones in place of
        those whose samples are all rewarded the same."""
        config, key = self.config, f"step {generation}"
        wanted = self.prompts_per_generation
        rollouts = self.roll_out(self._take_prompts(wanted), key)
        scores = self.score(rollouts)
        if not config.use_dynamic_sampling:
            self.look_ahead(generation + 1)
            return rollouts, scores, {}
        tried = 1
        while tried < config.dynamic_sampling_max_gen_batches:
            lacking = wanted - int(self._has_spread(scores).sum())
            if lacking <= 0:
                break
            more = self.roll_out(self._take_prompts(lacking), f"{key}/{tried}")
            rollouts, scores = rollouts + more, scores + self.score(more)
            tried += 1
        flat = (~self._has_spread(scores)).tolist()
        # Those with spread, and as many others as are wanted to make the batch whole.
        groups = sorted(range(len(flat)), key=flat.__getitem__)[:wanted]
        each = config.num_generations
        rows = [group * each + place for group in sorted(groups) for place in range(each)]
        self.look_ahead(generation + 1)
        counts = {
            "dynamic_sampling/batches": tried,
            "dynamic_sampling/replaced": len(flat) - wanted,
        }
        return rollouts.rows(rows), scores.rows(rows), counts

    def look_ahead(self, generation: int) -> None:
        """Called when the prompts of `generation` are known, before the trainer trains."""

    def roll_out(self, numbers: list[int], key: str) -> Rollouts:
        """Samples of the dataset's rows `numbers`; `key` seeds them."""
        prompts = [self.job.train[number] for number in numbers]
        with self.phases("rollout"):
            return self.roll_out_prompts(prompts, key, self.config.num_generations)

    def roll_out_prompts(self, prompts: list[Prompt], key: str, copies: int) -> Rollouts:
        repeated, found = [prompt for prompt in prompts for _ in range(copies)], {}
        if function := self.trainer.rollout_func:
            self.sync_engines()
            ends = self.tokenizer.stop_token_ids()
            samples, found = sample_by_function(
                function, self.trainer, self.role, prompts, copies, ends
            )
            self.pool.generation_completed()
        else:
            requests = [
                self._request(prompt.tokens, request_seed(self.config.seed, key, i))
                for i, prompt in enumerate(repeated)
            ]
            if self.job.tools or self.job.environment:
                return self._of_conversations(repeated, requests)
            completions = self.sample_policy(requests)
            samples = [Sample.of(r.prompt, c) for r, c in zip(requests, completions, strict=True)]
        return Rollouts(
            samples,
            [prompt.text for prompt in repeated],
            [self._text(p.text, s.tokens) for p, s in zip(repeated, samples, strict=True)],
            _columns(repeated) | found,
        )

    def _request(self, prompt: list[int], seed: int) -> Request:
        config = self.config
        room = self.job.max_model_len - len(prompt)
        return Request(
            prompt,
            min(config.max_completion_length, room),
            seed,
            config.temperature,
            config.top_p,
            config.top_k,
            config.min_p or 0.0,
            config.repetition_penalty,
            config.stop or (),
            config.bad_words or (),
            config.structured_outputs,
        )

    def _text(self, prompt: Text, tokens: list[int]) -> Text:
        text = self.tokenizer.decode(tokens)
        return [{"role": "assistant", "content": text}] if is_conversation(prompt) else text

    def _of_conversations(self, prompts: list[Prompt], requests: list[Request]) -> Rollouts:
        answers = self.config.max_tool_calling_iterations
        with self.policys_engines():
            conversations = run_turns(
                prompts,
                requests,
                self.tokenizer.inner,
                generate=self.pool.generate,
                once=self.role.once,
                tools=self.job.tools,
                environment=self.job.environment,
                max_turns=None if answers is None else answers + 1,
                max_completion_length=self.config.max_completion_length,
                max_prompt_length=self.job.room,
                max_sequence_length=self.job.max_model_len,
                chat_template_kwargs=self.config.chat_template_kwargs,
            )
        columns = _columns(prompts)
        if self.job.environment and self.job.environment.gives_reward:
            columns[ENVIRONMENT_REWARD] = [c.reward for c in conversations]
        return Rollouts(
            [
                Sample(c.prompt.tokens, c.tokens, c.log_probs, c.finished, c.mask)
                for c in conversations
            ],
            [c.prompt.text for c in conversations],
            [c.messages for c in conversations],
            columns,
            metrics=conversation_metrics(conversations),
        )

    def score(self, rollouts: Rollouts) -> Scores:
        """Each sample's rewards, computed once and shared by all ranks."""
        call = RewardCall(
            self.step,
            rollouts.prompts,
            rollouts.completions,
            [sample.tokens for sample in rollouts.samples],
            rollouts.columns,
            self.trainer.state,
        )
        timeout = self.config.reward_timeout
        with self.phases("reward"):
            return self.role.once(lambda: score(self.trainer.rewards, call, timeout))

    def describe(self, rollouts: Rollouts, scores: Scores, copies: int) -> dict[str, float]:
        """Metrics of scored samples, `copies` of each prompt, under TRL's names."""
        rewards = sum_rewards(scores.rewards, self.config.reward_weights)
        return (
            group_metrics(rewards, copies)
            | length_metrics(rollouts.samples)
            | reward_metrics(self.trainer.rewards, scores.rewards)
            | {name: sum(values) / len(values) for name, values in scores.metrics.items()}
            | rollouts.metrics
        )

    def evaluate(self, datasets: dict[str, Rows[Prompt]] | None = None) -> dict[str, float]:
        metrics = {}
        copies = self.config.num_generations_eval or self.config.num_generations
        for name, rows in (datasets or self.job.evals).items():
            prompts = [rows[number] for number in range(rows.size)]
            rollouts = self.roll_out_prompts(prompts, name, copies)
            scores = self.score(rollouts)
            measured = self.describe(rollouts, scores, copies) | self._computed(rollouts)
            metrics |= of_dataset(name, measured)
        self.phases.take()
        return metrics

    def _computed(self, rollouts: Rollouts) -> dict[str, float]:
        if self.trainer.compute_metrics is None:
            return {}
        truths = next((rollouts.columns[n] for n in GROUND_TRUTHS if n in rollouts.columns), None)
        prediction = EvalPrediction(predictions=rollouts.completions, label_ids=truths)
        found = self.role.once(lambda: self.trainer.compute_metrics(prediction))
        return {name.removeprefix("eval_"): value for name, value in found.items()}

    def sync_engines(self) -> dict[str, float]:
        """Gives the engines the policy's weights, unless they have them.

        Raises:
            SyncError: when they were given others, now or by the step before.

        Returns:
            What has moved, as metrics.
        """
        if self.difference:
            raise self.difference
        sent = {}
        if self.pool.behind(self.policy.version):
            sent = self.sync.push(self.policy.version)
            self.tensors_sent = sent["tensors"]
        self.synced_version = self.pool.version
        return {f"sync/{name}": float(value) for name, value in sent.items()}

    def _try_to_sync(self) -> None:
        """The step is made, whatever becomes of the engines: who next needs them finds out."""
        try:
            self.sent = self.sync_engines()
        except SyncError as error:
            self.difference = error
        except EngineError as error:
            self.loop.say(f"warning: {error}")

    def run_ended(self) -> None:
        """
        Raises:
            SyncError: when the last step's weights differ in the engines, which nobody needed.
        """
        if self.difference:
            raise self.difference

    def sample_policy(self, requests: list[Request]) -> list[Completion]:
        """One completion a request, in order."""
        with self.policys_engines():
            return self.pool.generate(requests)

    @contextmanager
    def policys_engines(self) -> Iterator[None]:
        """Engines that hold the policy's weights, and sleep afterwards, as the trainer may need
        their device memory. If that is asked for, the policy makes room: gradients and optimizer
        go before the engines' weights wake, parameters when these are loaded."""
        makes_room = self.config.rollout.offload_policy
        try:
            if makes_room:
                self.policy.free_training_state()
                with self.phases("sync"):
                    self.sent |= self.sync_engines()
                self.policy.leave_device()
            else:
                self.sync_engines()
            yield
            self.pool.sleep()
        except EngineError:
            if makes_room:  # for the policy, which is saved
                self.pool.close()
                self.role.all_gather(None)
            raise
        finally:  # what is saved when engines fail has to be there
            self.policy.return_to_device()

    def _refill(self) -> None:
        """Gives the policy's weights to engines that were restarted while others generate."""
        self.policy.return_parameters()
        self.sync.push(self.policy.version)
        if self.config.rollout.offload_policy:
            self.policy.leave_device()

    def shown_completions(self, count: int) -> int:
        """How many of `count` completions are recorded."""
        asked = self.config.log_completions
        return count if asked is True else min(count, int(asked))

    def log_completions(self, rollouts: Rollouts, scores: Scores, rewards: Tensor) -> None:
        """Records some of the samples."""
        if not self.loop.progress:
            return
        rows = [
            {
                "prompt": rollouts.prompts[i],
                "completion": rollouts.completions[i],
                "reward": None if rewards[i].isnan() else rewards[i].item(),
                **{name: values[i] for name, values in scores.extra.items()},
            }
            for i in range(self.shown_completions(len(rollouts)))
        ]
        self.loop.progress.completions(self.step, rows)

    def state(self) -> dict:
        return {
            "entropy": self.update.entropy.state(),
            "cursor": self.cursor,
            "num_tokens": self.num_tokens,
            "use_of_generations": self._use_of_generations(),
            "hand_overs": {str(g): astuple(h) for g, h in self.hand_overs.items()},
        }

    def tensors(self) -> dict[str, Tensor]:
        """Generations that are not used up."""
        return {
            f"{generation}/{name}": tensor
            for generation, batch in self.held.items()
            for name, tensor in self.update.everywhere(batch).items()
        }

    def _restore(self, saved: dict) -> None:
        self.update.entropy.restore(saved.get("entropy"))
        self.cursor = saved.get("cursor", 0)
        self.num_tokens = saved.get("num_tokens", 0)
        use, now = saved.get("use_of_generations"), self._use_of_generations()
        if saved["tensors"] and use != now:
            changed = next(name for name in now if use[name] != now[name])
            raise ConfigError(
                f"{changed}={now[changed]}: the checkpoint holds samples that are not used up and "
                f"has {changed}={use[changed]}; go on with that, or from another checkpoint"
            )
        for key, tensor in saved["tensors"].items():
            generation, _, name = key.partition("/")
            if name in OF_LAST_STAGE and not self.role.is_last_stage:
                tensor = torch.zeros_like(tensor)
            self.held.setdefault(int(generation), {})[name] = tensor
        self.hand_overs = {int(g): HandOver(*h) for g, h in saved.get("hand_overs", {}).items()}
        for generation, batch in self.held.items():  # this layout may want another length
            length, multiple = batch["tokens"].shape[1], self.policy.length_multiple
            self.held[generation] = _padded(batch, -(-length // multiple) * multiple)

    def _use_of_generations(self) -> dict[str, int | bool]:
        """What samples that are kept for further updates depend on."""
        config, cycle = self.config, self.cycle
        sequences = config.per_device_train_batch_size * self.role.layout.data
        return {
            "num_generations": config.num_generations,
            "sequences of a generation": sequences * cycle.steps_per_generation,
            "sequences of a step": sequences * cycle.gradient_accumulation_steps,
            "num_iterations": cycle.num_iterations,
            "beta above 0": config.beta > 0,
        }

    def _reference(self) -> Reference | BaseReference | None:
        config, path = self.config, self.trainer.ref_path
        if not config.beta:
            return None
        if config.peft_config and path is None:
            return BaseReference(self.policy)
        model = self.model if path is None else replace(self.model, path=path)
        return Reference(self.role, self.shape, model, config)

    def _mismatch_limits(self) -> MismatchLimits:
        rollout, reason = self.config.rollout, self.why_incomparable()
        if reason is None:
            return MismatchLimits(rollout.mismatch_warn, rollout.mismatch_stop)
        if rollout.mismatch_warn is not None:
            self.loop.say(f"rollout.mismatch_warn={rollout.mismatch_warn} is off with {reason}")
        return MismatchLimits(None, None)

    def why_incomparable(self) -> str | None:
        """Why the engines' log-probabilities are rightly not the policy's; None where they are."""
        return why_incomparable(self.config)

    def _move_reference(self, done: int) -> None:
        config = self.config
        if config.sync_ref_model and done % config.ref_model_sync_steps == 0:
            self.reference.mix(self.policy, config.ref_model_mixup_alpha)

    def _take_prompts(self, count: int) -> list[int]:
        """The numbers of the next rows of the dataset."""
        numbers = self._next_prompts(count)
        self.cursor += count
        return numbers

    def _next_prompts(self, count: int) -> list[int]:
        return [self.order.rows(self.cursor + i)[0] for i in range(count)]

    def _has_spread(self, scores: Scores) -> Tensor:
        rewards = sum_rewards(scores.rewards, self.config.reward_weights)
        return ~groups_without_spread(rewards, self.config.num_generations)

    def _rows_of(self, parts: list[tuple[int, int]]) -> Batch:
        """The rows of the step's micro-batches, of one generation or several."""
        if len({g for g, _ in parts}) == 1 and len(parts) == self.cycle.steps_per_generation:
            return dict(self.held[parts[0][0]])
        length = max(self.held[generation]["tokens"].shape[1] for generation, _ in parts)
        rows = [self._part(generation, part, length) for generation, part in parts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _part(self, generation: int, part: int, length: int) -> Batch:
        """The rows of one micro-step, drawn from all groups, padded to `length`."""
        batch = self.held[generation]
        order = list(range(len(batch["tokens"])))
        random.Random(f"{self.config.seed}/parts/{generation}").shuffle(order)
        size = len(order) // self.cycle.steps_per_generation
        rows = order[part * size : (part + 1) * size]
        return _padded({name: t[rows] for name, t in batch.items()}, length)

    def _drop_used(self, step: int) -> None:
        needed = {generation for generation, _ in self.cycle.parts(step + 1)}
        self.held = {g: batch for g, batch in self.held.items() if g in needed}
        self.hand_overs = {g: self.hand_overs[g] for g in self.held}

    def generate_and_score(self, rows: Sequence[dict]) -> tuple[list[str], Tensor, Tensor]:
        self._check_count(len(rows) * self.config.num_generations)
        rollouts = self.roll_out_given(rows)
        batch = self.batch_of(rollouts, self.score(rollouts))
        ids = [torch.tensor(sample.tokens) for sample in rollouts.samples]
        padding = self.tokenizer.inner.pad_token_id or 0
        self.phases.take()
        texts = [self.tokenizer.inner.decode(sample.prompt) for sample in rollouts.samples]
        return texts, pad_sequence(ids, True, padding), batch["advantages"]

    def roll_out_given(self, rows: Sequence[dict]) -> Rollouts:
        """Samples of rows that are not of the run's own dataset."""
        prompts = self.job.read_prompts(rows)
        return self.roll_out_prompts(prompts, "asked", self.config.num_generations)

    def compute_loss(self, inputs: Mapping[str, Tensor]) -> float:
        mask = inputs["completion_mask"]
        prompts = _unpadded(inputs["prompt_ids"], inputs["prompt_mask"])
        completions = _unpadded(inputs["completion_ids"], mask)
        self._check_count(len(completions))
        batch = pad_batch(prompts, completions, self.policy.length_multiple)
        tokens = inputs.get("num_items_in_batch", mask.sum())
        batch["tokens_per_update"] = torch.as_tensor(tokens).double().expand(len(prompts)).clone()
        if self.reference:
            batch["reference"] = self.reference.log_probs(batch, self.config.temperature)
        for name, entry in TRL_LOG_PROBS.items():
            if name in inputs:
                batch[entry] = align(_unpadded(inputs[name], mask), batch["mask"])
        if "rollout" not in batch:  # they are then taken to be the policy's own
            own, _ = self.policy.log_probs(batch, self.config.temperature)
            batch["rollout"] = batch.get("old", own)
        batch["advantages"] = inputs["advantages"]
        return self.update.value(batch)

    def _check_count(self, completions: int) -> None:
        ranks = self.role.layout.data
        if completions % ranks:
            raise ConfigError(
                f"inputs: {completions} completions do not divide by {ranks} data parallel ranks"
            )


def _columns(prompts: Sequence[Prompt]) -> dict[str, list]:
    return {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}


def _padded(batch: Batch, length: int) -> Batch:
    return {n: pad(t, (0, length - t.shape[1])) if t.ndim > 1 else t for n, t in batch.items()}


def _unpadded(values: Tensor, mask: Tensor) -> list[list]:
    return [row[keep.bool()].tolist() for row, keep in zip(values, mask, strict=True)]
