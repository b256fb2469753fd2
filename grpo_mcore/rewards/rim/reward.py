"""The reward that judges give."""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tqdm import tqdm

from grpo_mcore.config.compose import read_section
from grpo_mcore.config.reward_system import JudgeModelConfig, RewardSystemConfig
from grpo_mcore.data.chat import Text
from grpo_mcore.data.text import extract_teaching
from grpo_mcore.errors import ConfigError
from grpo_mcore.event_loop import event_loop
from grpo_mcore.rewards.rim.endpoint import Cache, Endpoint, JudgeModel
from grpo_mcore.rewards.rim.judging import LARGE, Judgement, consistent, judge
from grpo_mcore.rewards.rim.settings import active_judges, check_reward_system
from grpo_mcore.rewards.text import text_of

COLUMNS = {
    "question": "questions",
    "ground_truth": "ground_truths",
    "plan": "student_approaches",
    "baseline": "baseline_answers",
    "teaching": "teachings",
    "answer": "answers",
}
"""Field of a judge's prompt -> the column it is filled with, as TeacherGRPOTrainer offers it."""
NOT_GIVEN = "(not given)"
LEAST_PATIENCE = 16
"""Requests in a row without an answer before a model is given up for the rest of a call."""
NO_KEY = "none"
"""The client insists on a key, endpoints without any ignore it."""


@dataclass(frozen=True)
class RIMEvaluation:
    """What the judges say of one response.

    Attributes:
        reward: the weighted mean of the scores; None where every judge has failed.
        rationale: those of all judges, each after its judge's name.
        judge_scores: by judge, after the consistency rules; None of those that failed.
        judge_explanations: by judge that has not failed.
        extra: the whole info dictionary (RIMReward.__call__).
    """

    reward: float | None
    rationale: str
    judge_scores: dict[str, float | None]
    judge_explanations: dict[str, str]
    extra: dict[str, Any]

    @property
    def score(self) -> float | None:
        return self.reward


class RIMReward:
    """The mean of several judges' scores, in [0, 1], weighted as configured (ATLAS, "Reward
    interpretation"). Each judge is a prompt to a small model at several temperatures; where the
    verdicts disagree or are unsure, a large model, shown them, decides. Scores are then held to
    the consistency rules.

    A judge that fails gives no score: the mean is over the others, None where there is none.

    Attributes:
        own_judge: where the run's own judge is, for models without a `base_url`; set by the
            trainer before the first call.
    """

    def __init__(
        self,
        student_model: Any = None,
        teacher_model: Any = None,
        tokenizer: Any = None,
        config_path: str | None = None,
        config: RewardSystemConfig | None = None,
    ):
        """
        Args:
            student_model, teacher_model, tokenizer: kept for the user; judges are models of their
                own.
            config_path: a YAML file of RewardSystemConfig's settings, such as
                examples/configs/reward_system/interpretation.yaml.
            config: the settings themselves; neither: the defaults.

        Raises:
            ConfigError: for a setting that is unknown or cannot work.
            TypeError: for both config_path and config.
        """
        if config_path is not None and config is not None:
            raise TypeError("config_path and config are both given; give one")
        if config_path is not None:
            config = read_section(config_path, RewardSystemConfig)
        self.student_model, self.teacher_model = student_model, teacher_model
        self.tokenizer = tokenizer
        self.config = config or RewardSystemConfig()
        check_reward_system(self.config)
        self.judges = active_judges(self.config)
        self.own_judge: Endpoint | None = None
        self.opened: dict[Endpoint | None, tuple[JudgeModel, JudgeModel]] = {}
        """The models by the `own_judge` they were made for: the newest only."""

    @property
    def needs_own_judge(self) -> bool:
        """Whether a model has no `base_url` to go to."""
        return self.config.small.base_url is None

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        return_info_dict: bool = False,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, Sequence], None] | None = None,
        **columns: Sequence,
    ) -> list[float | None] | tuple[list[float | None], list[dict[str, Any]]]:
        """One reward for each completion; all requests of a call are under way together.

        Args:
            completions: what the teacher wrote.
            return_info_dict: also return, for each completion, a dictionary of `reward`, and by
                judge `scores` (after the consistency rules, None of those that failed),
                `principles`, `rationales`, `uncertainties`, `tiers` ("small" or "large") and
                `failures` (lists of why requests brought no verdict).
            log_metric: is told of each score, `rim_rewards/<judge>`; of the scores that each judge
                lacks, `rim_failures/<judge>`; of the requests that failed, `rim_failed_requests`;
                and of each judgement whether the large model was asked, `rim_escalated`, 1 or 0.
            log_extra: is given the dictionaries, as `rim_explanations`.
            columns: the values of COLUMNS, as far as they are known; questions default to the
                prompts, teachings to what stands in the completions' tags.

        Raises:
            ConfigError: when models need the run's own judge and there is none.
        """
        columns = {
            "questions": [text_of(prompt) for prompt in prompts],
            "teachings": [extract_teaching(text_of(completion)) for completion in completions],
        } | columns
        given = {field: name for field, name in COLUMNS.items() if name in columns}
        cases = [
            dict.fromkeys(COLUMNS, NOT_GIVEN)
            | {field: _as_text(columns[name][place]) for field, name in given.items()}
            for place in range(len(completions))
        ]
        judging = asyncio.run_coroutine_threadsafe(self._judge_all(cases), event_loop())
        try:
            judged = judging.result()
        except BaseException:  # as of Ctrl-C: nobody wants the other verdicts any more
            judging.cancel()
            raise
        infos = [self._info(judgements) for judgements in judged]
        self._warn(judged)
        if log_metric:
            self._log(log_metric, judged, infos)
        if log_extra:
            log_extra("rim_explanations", infos)
        rewards = [info["reward"] for info in infos]
        return (rewards, infos) if return_info_dict else rewards

    def evaluate(
        self,
        prompt: Text,
        response: Text,
        *,
        ground_truth: str = NOT_GIVEN,
        plan: str = NOT_GIVEN,
        baseline: str = NOT_GIVEN,
        answer: str = NOT_GIVEN,
    ) -> RIMEvaluation:
        """What the judges say of one response to a prompt.

        Args:
            plan, baseline: the student's approach, and its answer without teaching.
            answer: its answer with the teaching.

        Raises:
            ConfigError: as `__call__`.
        """
        given = {"ground_truth": ground_truth, "plan": plan, "baseline": baseline, "answer": answer}
        columns = {COLUMNS[field]: [value] for field, value in given.items()}
        _, (info,) = self([prompt], [response], return_info_dict=True, **columns)
        rationales = info["rationales"]
        rationale = "\n".join(f"{name}: {text}" for name, text in rationales.items())
        return RIMEvaluation(info["reward"], rationale, info["scores"], rationales, info)

    async def _judge_all(self, cases: list[dict[str, str]]) -> list[dict[str, Judgement]]:
        small, large = self._models()
        small.unanswered = large.unanswered = 0

        async def of_case(case: dict[str, str]) -> dict[str, Judgement]:
            found = await asyncio.gather(
                *(judge(asked, case, self.config, small, large) for asked in self.judges.values())
            )
            return dict(zip(self.judges, found, strict=True))

        return await asyncio.gather(*(of_case(case) for case in cases))

    def _models(self) -> tuple[JudgeModel, JudgeModel]:
        """The small and the large one. Made in the event loop, to which connections belong, and
        again where the run has another judge of its own, as after it was closed."""
        if self.own_judge not in self.opened:
            self.opened = {self.own_judge: self._open_models()}
        return self.opened[self.own_judge]

    def _open_models(self) -> tuple[JudgeModel, JudgeModel]:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient  # takes a second

        config = self.config
        if self.needs_own_judge and self.own_judge is None:
            raise ConfigError(
                "reward_system.small.base_url=None: there is no judge of the run's own; give the "
                "URL of an OpenAI-compatible endpoint, or judge.path to TeacherGRPOTrainer"
            )
        gate = asyncio.Semaphore(config.max_workers)
        verdicts = None if config.cache is None else Cache(config.cache)
        seconds = config.timeout * (config.max_retries + 1)

        patience = max(LEAST_PATIENCE, 2 * config.max_workers)

        @cache
        def client(base_url: str, api_key: str | None) -> AsyncOpenAI:
            # A proxy that the environment names for the world outside does not know the run's own.
            is_own = self.own_judge is not None and base_url == self.own_judge.base_url
            return AsyncOpenAI(
                base_url=base_url,
                api_key=api_key or NO_KEY,
                timeout=config.timeout,
                max_retries=config.max_retries,
                http_client=DefaultAsyncHttpxClient(trust_env=False) if is_own else None,
            )

        def model(endpoint: Endpoint, settings: JudgeModelConfig) -> JudgeModel:
            asked = client(endpoint.base_url, endpoint.api_key)
            return JudgeModel(endpoint.model, settings, asked, seconds, gate, patience, verdicts)

        small = _endpoint(config.small, self.own_judge)
        return model(small, config.small), model(_endpoint(config.large, small), config.large)

    def _info(self, judgements: Mapping[str, Judgement]) -> dict[str, Any]:
        verdicts = {name: j.verdict for name, j in judgements.items() if j.verdict}
        raw = {name: verdicts[name].score if name in verdicts else None for name in judgements}
        scores = consistent(raw, self.config.consistency)
        weights = {name: self.judges[name].weight for name in verdicts}
        total = sum(weights.values())
        reward = sum(w * scores[n] for n, w in weights.items()) / total if total else None
        return {
            "reward": reward,
            "scores": scores,
            "principles": {
                name: [principle.model_dump() for principle in verdict.principles]
                for name, verdict in verdicts.items()
            },
            "rationales": {name: verdict.rationale for name, verdict in verdicts.items()},
            "uncertainties": {name: verdict.uncertainty for name, verdict in verdicts.items()},
            "tiers": {name: j.tier for name, j in judgements.items()},
            "failures": {name: j.failures for name, j in judgements.items() if j.failures},
        }

    def _log(
        self,
        log_metric: Callable[[str, float], None],
        judged: list[dict[str, Judgement]],
        infos: list[dict[str, Any]],
    ) -> None:
        for name in self.judges:
            scores = [info["scores"][name] for info in infos]
            for score in scores:
                if score is not None:
                    log_metric(f"rim_rewards/{name}", score)
            log_metric(f"rim_failures/{name}", scores.count(None))
        everything = [judgement for judgements in judged for judgement in judgements.values()]
        log_metric("rim_failed_requests", sum(len(j.failures) for j in everything))
        for judgement in everything:
            log_metric("rim_escalated", float(judgement.tier == LARGE))

    def _warn(self, judged: list[dict[str, Judgement]]) -> None:
        """Failures are no errors, but whoever watches the run shall know of them."""
        everything = [judgement for judgements in judged for judgement in judgements.values()]
        failed = [judgement for judgement in everything if judgement.verdict is None]
        if failed:
            tqdm.write(
                f"warning: {len(failed)} of {len(everything)} judgements failed; the first: "
                f"{failed[0].failures[-1]}"
            )


def _endpoint(model: JudgeModelConfig, otherwise: Endpoint | None) -> Endpoint:
    """Where the model is; `otherwise` is where models without a `base_url` are."""
    if model.base_url is None:
        return Endpoint(otherwise.base_url, model.model or otherwise.model, otherwise.api_key)
    key = os.environ[model.api_key_env] if model.api_key_env else None
    return Endpoint(model.base_url, model.model, key)


def _as_text(value: Any) -> str:
    """A column's value; several answers one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and len(value) > 1:
        return "\n".join(f"{number}. {text}" for number, text in enumerate(value, 1))
    return str(value[0] if isinstance(value, Sequence) and value else value)


def asking_own_judge(sources: Sequence[object]) -> list[RIMReward]:
    """The rewards that ask the run's own judge."""
    return [s for s in sources if isinstance(s, RIMReward) and s.needs_own_judge]
