"""Tools and environments at work, on the one rank where they live."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Real
from typing import Any

from grpo_mcore.data.chat import Text, is_conversation
from grpo_mcore.data.prompts import Prompt
from grpo_mcore.environments.calls import Turn
from grpo_mcore.environments.environment import EnvironmentFailure, EnvironmentSpec, StepResult
from grpo_mcore.event_loop import event_loop


@dataclass(frozen=True)
class Answer:
    """What follows a turn of the model: messages, or text after a prompt of text; None where the
    conversation is done."""

    observation: Text | None
    reward: float = 0.0
    tool_calls: int = 0
    tool_failures: int = 0


class Answerer:
    """Answers the model in the conversations of one batch. Async functions run all at once, beside
    the others, which run one after the other."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tools: Sequence[Callable],
        environment: EnvironmentSpec | None,
    ):
        self.prompts, self.spec = prompts, environment
        self.environments: list = []
        """Made by `reset`, on the one rank."""
        self.tools = {tool.__name__: tool for tool in tools}

    def reset(self) -> list[Text | None]:
        """Makes the environments. Returns the first observation of each."""
        self.environments = [self.spec.create() for _ in self.prompts]
        started = []
        for environment, prompt in zip(self.environments, self.prompts, strict=True):
            given = _taken(environment.reset, prompt.columns | {"prompt": prompt.text})
            started.append(start(environment.reset, **given))
        return [
            self._observation("reset", place, self._result("reset", outcome))
            for place, outcome in enumerate(started)
        ]

    def answer(self, calling: dict[int, Turn], stepping: dict[int, str]) -> dict[int, Answer]:
        """What follows the turns that tools answer and the texts that environments answer, by the
        conversation's place."""
        collect = {place: self._call(place, turn) for place, turn in calling.items()}
        collect |= {place: self._step(place, text) for place, text in stepping.items()}
        return {place: answer() for place, answer in collect.items()}

    def rewards(self) -> list[float]:
        """What `get_reward` gives for each conversation."""
        started = [start(environment.get_reward) for environment in self.environments]
        results = [self._result("get_reward", outcome) for outcome in started]
        return [self._number("get_reward", reward) for reward in results]

    def _call(self, place: int, turn: Turn) -> Callable[[], Answer]:
        if turn.error:
            content = str({"error": f"The tool call cannot be read: {turn.error}"})
            message = {"role": "tool", "name": "unknown", "content": content}
            return lambda: Answer([message], tool_calls=1, tool_failures=1)
        tools = dict(self.tools)
        if self.spec:
            names = [method.__name__ for method in self.spec.methods]
            tools |= {name: getattr(self.environments[place], name) for name in names}
        outcomes = [start(tools.get(c.name, _missing(c.name)), **c.arguments) for c in turn.calls]

        def finish() -> Answer:
            messages, failures = [], 0
            for call, outcome in zip(turn.calls, outcomes, strict=True):
                try:
                    content = str(outcome.result())
                except Exception as error:  # the model is told
                    content, failures = str({"error": str(error)}), failures + 1
                messages.append({"role": "tool", "name": call.name, "content": content})
            return Answer(messages, tool_calls=len(messages), tool_failures=failures)

        return finish

    def _step(self, place: int, text: str) -> Callable[[], Answer]:
        outcome = start(self.environments[place].step, text)

        def finish() -> Answer:
            result = self._result("step", outcome)
            if not isinstance(result, tuple) or len(result) != len(StepResult._fields):
                raise self._failure(
                    "step", f"returned {result!r}; return StepResult(observation, reward, done)"
                )
            observation, reward, done = result
            reward = self._number("step", reward)
            if done:
                return Answer(None, reward)
            observation = self._observation("step", place, observation)
            if observation is None:
                raise self._failure("step", "returned no observation, though done is False")
            if isinstance(observation, str) and is_conversation(self.prompts[place].text):
                observation = [{"role": "user", "content": observation}]
            return Answer(observation, reward)

        return finish

    def _result(self, method: str, outcome: Future) -> Any:
        try:
            return outcome.result()
        except Exception as error:
            raise self._failure(method, f"failed: {type(error).__name__}: {error}") from error

    def _observation(self, method: str, place: int, observation: Any) -> Text | None:
        if observation is None or isinstance(observation, str):
            return observation
        messages = isinstance(observation, list) and all(map(_is_message, observation))
        if not messages or not observation or observation[-1]["role"] not in ("user", "tool"):
            raise self._failure(
                method,
                f"gave the observation {observation!r}; give text, or messages of a role and a "
                "content, a user's or a tool's last",
            )
        if not is_conversation(self.prompts[place].text):
            raise self._failure(method, "gave messages, but the prompt is plain text; give text")
        return observation

    def _number(self, method: str, reward: Any) -> float:
        reward = reward.item() if hasattr(reward, "item") else reward
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise self._failure(method, f"gave the reward {reward!r}; give a finite number")
        return float(reward)

    def _failure(self, method: str, fault: str) -> EnvironmentFailure:
        return EnvironmentFailure(f"environment {self.spec.name}: {method} {fault}")


def start(function: Callable, /, *args, **kwargs) -> Future:
    """The outcome of a function; one that is async runs on."""
    outcome: Future = Future()
    try:
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result):
            return asyncio.run_coroutine_threadsafe(result, event_loop())
        outcome.set_result(result)
    except Exception as error:  # carried to who asks for the outcome
        outcome.set_exception(error)
    return outcome


def _missing(name: str) -> Callable:
    def missing(**_):
        raise LookupError(f"Tool {name} not found.")

    return missing


def _taken(function: Callable, given: dict) -> dict:
    """Those of `given` that the function names, or all where it takes **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if name in names}


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and "role" in item and "content" in item
