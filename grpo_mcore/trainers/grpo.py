"""Group relative policy optimisation: a prompt's samples are compared by their rewards."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import EvalPrediction

from grpo_mcore.callbacks.runner import AnyCallback
from grpo_mcore.checkpoint.start import Start
from grpo_mcore.config import ConfigError, GRPOConfig, TeachingConfig, trained_model
from grpo_mcore.data.prompts import Prompt
from grpo_mcore.data.sources import Rows
from grpo_mcore.models.sources import local_model
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import World, world_size
from grpo_mcore.preflight.grpo_job import check_grpo
from grpo_mcore.preflight.judge import check_judge_used
from grpo_mcore.preflight.models import check_reference
from grpo_mcore.report.phases import Phases
from grpo_mcore.report.result import TrainingResult
from grpo_mcore.rewards import (
    RewardSource,
    RewardSpec,
    as_reward_specs,
    listed,
)
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.start import spec_of_trained, start_engines
from grpo_mcore.steps import by_hand
from grpo_mcore.steps.grpo_step import GRPOSession
from grpo_mcore.steps.policy_engines import PolicyEngines
from grpo_mcore.steps.prompt_sampler import ENVIRONMENT_REWARD, PromptSampler
from grpo_mcore.steps.sampler import Sampler
from grpo_mcore.steps.scoring import Scoring
from grpo_mcore.steps.session import Session
from grpo_mcore.steps.update import open_reference
from grpo_mcore.trainers.arguments import (
    check_kind,
    either,
    read_settings,
    with_adapters,
    with_model,
    with_optimizers,
)
from grpo_mcore.trainers.base import BaseTrainer
from grpo_mcore.training.policy import Policy


class GRPOTrainer(BaseTrainer):
    """Trains a language model by GRPO (arXiv:2402.03300) on rewards of what it writes.

    The same script runs as one process under plain `python` and on every rank under torchrun.
    """

    algorithm = "grpo"
    accepted: ClassVar[tuple[type, ...]] = (GRPOConfig,)
    """What `args` may be."""
    config_class = GRPOConfig

    def __init__(
        self,
        model: Any = None,
        reward_funcs: RewardSource | list[RewardSource] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[AnyCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable[[list, "GRPOTrainer"], dict] | None = None,
        *,
        ref_model: Any = None,
        environment: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        config: GRPOConfig | None = None,
        tokenizer: Any = None,
        reward_fn: RewardSource | None = None,
        reward_model: RewardSource | None = None,
        num_generations: int | None = None,
        environment_factory: Any = None,
    ):
        """Checks everything that can be checked before models load.

        Args:
            model: a path, a hub id or a transformers model; NeMo RL's whole configuration, a
                dictionary; or what `args` would be.
            reward_funcs: functions of any style of `rewards.specs`, sequence-classification models,
                or paths or hub ids of such; one or several, weighed by `args.reward_weights`.
            train_dataset: rows with a column `prompt`, text or messages (`data.sources` says in
                which forms); further columns are passed on to the reward functions. None: `fit`
                brings it.
            eval_dataset: the same, or a dictionary of such.
            processing_class: a transformers tokenizer; None: the model's own.
            reward_processing_classes: the reward models' tokenizers, as in TRL.
            callbacks: NeMo RL's or transformers'.
            optimizers: (torch.optim.AdamW, LambdaLR), of which the settings count.
            peft_config: a peft.LoraConfig: train adapters only.
            tools: functions the model may call.
            rollout_func: samples in place of the engine. It is given this process's prompts, each
                `num_generations` times (all ranks that share a model copy are given the same), and
                this trainer, and returns "prompt_ids", "completion_ids" and "logprobs", a list for
                each prompt given, "env_mask" if it likes, and further columns for the rewards.
            ref_model: the reference model, of the same shape; None: the model as it is at first.
            environment: what answers the model, turn by turn (`grpo_mcore.environments`).
            compute_metrics: further metrics of an evaluation from a transformers.EvalPrediction of
                the completions' texts and the ground truths, if the data have any.
            config, tokenizer, reward_fn, reward_model, num_generations, environment_factory: other
                libraries' names for `args`, `processing_class`, `reward_funcs`,
                `args.num_generations` and `environment`.

        Raises:
            ConfigError: for a setting that cannot work.
            TypeError: for an argument given under two names.
        """
        args = either("args", args, "config", config)
        model, args = read_settings(model, args, self.config_class, self.algorithm)
        check_kind(args, *self.accepted)
        if num_generations not in (None, args.num_generations):
            warnings.warn(
                f"num_generations={num_generations} takes the place of args.num_generations="
                f"{args.num_generations}",
                stacklevel=2,
            )
            args = replace(args, num_generations=num_generations)
        self.tools, self.rollout_func = tools or [], rollout_func
        self.environment = either(
            "environment", environment, "environment_factory", environment_factory
        )
        self.compute_metrics = compute_metrics
        self._refuse_unused(args)
        tokenizer = either("processing_class", processing_class, "tokenizer", tokenizer)
        self.ref_path = None
        if ref_model is not None:
            self.ref_path = local_model("ref_model", ref_model, Path(args.output_dir) / "models")
        args = with_adapters(self._with_models(args, model, tokenizer), peft_config)
        args, self.lr_lambda = with_optimizers(args, optimizers)
        super().__init__(args, callbacks, tokenizer)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.reward_processing_classes = reward_processing_classes
        self.reward_sources: list[RewardSource] = []
        for source in (reward_funcs, reward_fn, reward_model):
            self.reward_sources += listed(source)
        if self._is_complete():
            self._get_ready()

    def fit(
        self,
        dataset: Any = None,
        reward_fn: RewardSource | list[RewardSource] | None = None,
        environment: Any = None,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        callbacks: list[AnyCallback] | None = None,
    ) -> TrainingResult:
        """Trains on `dataset` and tells how it went.

        Args:
            reward_fn: in place of the trainer's own rewards.
            environment: in place of the trainer's own.
        """
        return super().fit(
            dataset, max_steps, max_epochs, callbacks, reward_fn=reward_fn, environment=environment
        )

    def _refuse_unused(self, args: GRPOConfig) -> None:
        plain = GRPOConfig()
        for name in (field.name for field in fields(TeachingConfig)):
            if getattr(args, name) != getattr(plain, name):
                raise ConfigError(
                    f"{name}={getattr(args, name)}: is a setting of TeacherGRPOTrainer only"
                )

    def _with_models(self, args: GRPOConfig, model: Any, tokenizer: Any) -> GRPOConfig:
        return with_model(args, model, tokenizer)

    def _is_complete(self) -> bool:
        return self.train_dataset is not None and bool(self.reward_sources or self.environment)

    def _set_data(self, dataset: Any, reward_fn: Any = None, environment: Any = None) -> None:
        if dataset is not None:
            self.train_dataset = dataset
        if reward_fn is not None:
            self.reward_sources = listed(reward_fn)
        if environment is not None:
            self.environment = environment

    def _prepare(self) -> None:
        if self.train_dataset is None:
            raise ConfigError("train_dataset=None: give a dataset, here or to fit()")
        if not self.reward_sources and self.environment is None:
            raise ConfigError(
                "reward_funcs=None: give at least one reward function, or an environment"
            )
        self.args, self.job = check_grpo(
            self.args,
            world_size(),
            self.train_dataset,
            self.eval_dataset,
            self.processing_class,
            self.tools,
            self.environment,
        )
        self._check_reference()
        columns = {*self.job.train.columns} - {self.job.prompt_column}
        sources, environment = self.reward_sources, self.job.environment
        check_judge_used(sources)
        if environment and environment.gives_reward:
            sources = [*sources, _environment_reward(environment.name)]
            columns.add(ENVIRONMENT_REWARD)
        # What a rollout function of the user's own adds, nobody knows yet.
        self.rewards = self._specs(sources, None if self.rollout_func else columns)

    def _check_reference(self) -> None:
        if self.ref_path is None:
            return
        if not self.args.beta:
            raise ConfigError(f"ref_model={self.ref_path}: is of no use with beta=0")
        check_reference(self.ref_path, self.job.shape)

    def _specs(self, sources: list[RewardSource], columns: set[str] | None) -> list[RewardSpec]:
        return as_reward_specs(
            sources,
            self.args.reward_weights,
            self.reward_processing_classes,
            columns,
            getattr(self.args, "chat_template_kwargs", None),
        )

    def _world(self) -> tuple[dict[str, Layout], str, float]:
        layouts = {"policy": self.job.layout}
        return layouts, "colocated", self.args.rollout.deadline_seconds

    def _open_session(self, world: World, cleanup: ExitStack) -> Session:
        role, args, job = world.roles["policy"], self.args, self.job
        start = self._choose_start(world, "policy")
        rollout = args.rollout
        spec = spec_of_trained(
            args, args.model, job.tokenizer, job.max_model_len, rollout.policy_tensor_parallel
        )
        pool = start_engines(role, spec, job.engines, rollout, args.output_dir)
        cleanup.callback(pool.close)
        sample = self.rollout_func and (lambda prompts: self.rollout_func(prompts, self))

        def sampler(engines: PolicyEngines, scoring: Scoring) -> Sampler:
            return PromptSampler(job, args, role, engines, scoring, sample, self.compute_metrics)

        return self._steps(role, pool, start, sampler)

    def _steps(
        self,
        role: Role,
        pool: RolloutPool,
        start: Start,
        sampler: Callable[[PolicyEngines, Scoring], Sampler],
        samples_from_reference: bool = False,
    ) -> GRPOSession:
        """The steps' parts, put together. Engines may still be starting while models load."""
        args, job, phases = self.args, self.job, Phases()
        engines = PolicyEngines(pool, args, phases)
        scoring = Scoring(self.rewards, args, role, phases, self.runner)
        model = trained_model(args)
        policy = Policy(role, job.shape, model, args, args.peft_config, self.lr_lambda)
        return GRPOSession(
            args,
            job,
            policy,
            open_reference(policy, args, self.ref_path),
            sampler(engines, scoring),
            scoring,
            engines,
            start,
            self.runner,
            samples_from_reference,
        )

    def _open_evals(self, datasets: Any) -> dict[str, Rows[Prompt]]:
        return self.job.open_evals(datasets)

    # ATLAS's documented methods, for what they are good for beside training.

    def _generate_and_score(
        self, inputs: Sequence[dict] | Mapping[str, Sequence]
    ) -> tuple[list[str], Tensor, Tensor]:
        """Samples and scores `num_generations` completions of each prompt.

        Args:
            inputs: rows with a column `prompt`, or columns of such.

        Returns:
            Prompts as text, one a completion; completion_ids [completions, tokens], padded with 0
            (with the pad token, where there is one); advantages [completions]. Nothing on
            processes that only carry a student.

        Raises:
            ConfigError: when data parallel ranks cannot share the completions equally.
        """
        if isinstance(inputs, Mapping):
            inputs = [
                dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)
            ]
        with self._together() as session:
            if session is None:
                return [], torch.empty(0, 0), torch.empty(0)
            return by_hand.generate_and_score(session, inputs)

    def compute_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of given completions under the policy, without a gradient: training takes
        gradients through the pipeline, from `objectives.grpo.grpo_loss` as here.

        Args:
            model: as in transformers; the policy is meant, whatever is given.
            inputs: TRL's prompt_ids, prompt_mask, completion_ids, completion_mask [completions,
                tokens] and advantages [completions]. If they are there, also old_per_token_logps,
                ref_per_token_logps, sampling_per_token_logps [completions, tokens], which are else
                computed, and num_items_in_batch, else the tokens of these completions.

        Returns:
            A number, the same on every rank that trains; NaN on others.

        Raises:
            ConfigError: when data parallel ranks cannot share the completions equally.
        """
        with self._working() as session:
            if session is None:
                return torch.tensor(torch.nan)
            return torch.tensor(by_hand.compute_loss(session, inputs), dtype=torch.float64)


def _environment_reward(name: str) -> Callable:
    def environment(prompts, completions, environment_reward, **_):
        return environment_reward

    environment.__name__ = name
    return environment
