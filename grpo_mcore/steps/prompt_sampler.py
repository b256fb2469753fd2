"""Samples of prompts: by the policy's engines, in one turn or several, or by a user's function."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor
from transformers import EvalPrediction

from grpo_mcore.config import GRPOConfig
from grpo_mcore.data.chat import Text, is_conversation
from grpo_mcore.data.prompts import Prompt
from grpo_mcore.data.sources import Rows
from grpo_mcore.environments import conversation_metrics, run_turns
from grpo_mcore.parallel.groups import Role
from grpo_mcore.preflight.grpo_job import GRPOJob
from grpo_mcore.report.progress import Progress
from grpo_mcore.rewards import Scores
from grpo_mcore.rewards.specs import GROUND_TRUTHS
from grpo_mcore.rollout.requests import Request, request_seed
from grpo_mcore.rollout.samples import Rollouts, Sample
from grpo_mcore.steps.policy_engines import PolicyEngines
from grpo_mcore.steps.sampler import Sampler, recorded
from grpo_mcore.steps.scoring import Scoring
from grpo_mcore.steps.session import of_dataset
from grpo_mcore.steps.users_function import sample_by_function

ENVIRONMENT_REWARD = "environment_reward"
"""The column of an environment's own rewards."""


class PromptSampler(Sampler):
    """Samples that answer a dataset's prompts."""

    shown: ClassVar[dict[str, str]] = {
        "reward": "reward {:+.3f}",
        "reward_std": "+- {:.3f}",
        "kl": "kl {:.4f}",
        "grad_norm": "grad {:.2f}",
        "completions/mean_length": "tokens {:.1f}",
        "time/step": "{:.1f} s",
        "eval_reward": "reward {:+.3f}",
    }

    def __init__(
        self,
        job: GRPOJob,
        config: GRPOConfig,
        role: Role,
        engines: PolicyEngines,
        scoring: Scoring,
        function: Callable[[list[Text]], dict] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        """
        Args:
            function: samples in place of the engines (`steps.users_function`).
            compute_metrics: further metrics of an evaluation.
        """
        self.job, self.config, self.role = job, config, role
        self.engines, self.scoring, self.phases = engines, scoring, engines.phases
        self.function, self.compute_metrics = function, compute_metrics
        self.evaluates = bool(job.evals)

    def roll_out(self, numbers: list[int], key: str) -> Rollouts:
        prompts = [self.job.train[number] for number in numbers]
        with self.phases("rollout"):
            return self._of_prompts(prompts, key, self.config.num_generations)

    def roll_out_given(self, rows: Sequence[dict]) -> Rollouts:
        prompts = self.job.read_prompts(rows)
        return self._of_prompts(prompts, "asked", self.config.num_generations)

    def evaluate(self, datasets: dict[str, Rows[Prompt]] | None, step: int) -> dict[str, float]:
        metrics = {}
        copies = self.config.num_generations_eval or self.config.num_generations
        for name, rows in (datasets or self.job.evals).items():
            prompts = [rows[number] for number in range(rows.size)]
            rollouts = self._of_prompts(prompts, name, copies)
            scores = self.scoring(rollouts, step)
            measured = self.scoring.describe(rollouts, scores, copies) | self._computed(rollouts)
            metrics |= of_dataset(name, measured)
        self.phases.take()
        return metrics

    def record(
        self, progress: Progress, step: int, rollouts: Rollouts, scores: Scores, rewards: Tensor
    ) -> None:
        rows = [
            {
                "prompt": rollouts.prompts[i],
                "completion": rollouts.completions[i],
                "reward": None if rewards[i].isnan() else rewards[i].item(),
                **{name: values[i] for name, values in scores.extra.items()},
            }
            for i in range(recorded(self.config, len(rollouts)))
        ]
        progress.completions(step, rows)

    def _of_prompts(self, prompts: list[Prompt], key: str, copies: int) -> Rollouts:
        repeated, found = [prompt for prompt in prompts for _ in range(copies)], {}
        if self.function:
            self.engines.update()
            ends = self.job.tokenizer.stop_token_ids()
            samples, found = sample_by_function(self.function, self.role, prompts, copies, ends)
            self.engines.pool.generation_completed()
        else:
            requests = [
                self._request(prompt.tokens, request_seed(self.config.seed, key, i))
                for i, prompt in enumerate(repeated)
            ]
            if self.job.tools or self.job.environment:
                return self._of_conversations(repeated, requests)
            completions = self.engines.generate(requests)
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
        text = self.job.tokenizer.decode(tokens)
        return [{"role": "assistant", "content": text}] if is_conversation(prompt) else text

    def _of_conversations(self, prompts: list[Prompt], requests: list[Request]) -> Rollouts:
        answers = self.config.max_tool_calling_iterations
        with self.engines.awake():
            conversations = run_turns(
                prompts,
                requests,
                self.job.tokenizer.inner,
                generate=self.engines.pool.generate,
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

    def _computed(self, rollouts: Rollouts) -> dict[str, float]:
        if self.compute_metrics is None:
            return {}
        truths = next((rollouts.columns[n] for n in GROUND_TRUTHS if n in rollouts.columns), None)
        prediction = EvalPrediction(predictions=rollouts.completions, label_ids=truths)
        found = self.role.once(lambda: self.compute_metrics(prediction))
        return {name.removeprefix("eval_"): value for name, value in found.items()}


def _columns(prompts: Sequence[Prompt]) -> dict[str, list]:
    return {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
