"""Calls reward functions and refuses what cannot be trained on."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from numbers import Real
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from grpo_mcore import device
from grpo_mcore.data.chat import Text
from grpo_mcore.errors import KnownError
from grpo_mcore.event_loop import event_loop
from grpo_mcore.rewards.specs import GROUND_TRUTHS, WITHHELD, RewardSpec
from grpo_mcore.rewards.text import text_of

GRACE_SECONDS = 1.0
"""How much longer than their limit the event loop has to give async functions up."""


class RewardError(KnownError, RuntimeError):
    """A reward function failed; the text names it and the step."""


@dataclass(frozen=True)
class RewardCall:
    """What is to be scored. All sequences have one entry for each sample.

    Attributes:
        step: the training step, from 1, for the errors.
        completion_ids: the tokens of each completion.
        columns: the dataset's, and what the trainer adds. Where a name is also one of the call's
            own (`prompts`, `trainer_state`), functions are given the call's.
        trainer_state: passed on as it is.
    """

    step: int
    prompts: Sequence[Text]
    completions: Sequence[Text]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence] = field(default_factory=dict)
    trainer_state: Any = None

    def __post_init__(self):
        """
        Raises:
            ValueError: when the sequences differ in length.
        """
        own = {"completions": self.completions, "completion_ids": self.completion_ids}
        for name, values in (own | dict(self.columns)).items():
            if len(values) != len(self.prompts):
                raise ValueError(f"{name}: {len(values)} for {len(self.prompts)} prompts")


@dataclass(frozen=True)
class Scores:
    """What the reward functions gave and logged.

    Attributes:
        rewards: [samples, functions], float32; NaN where a function returned None.
        metrics: name -> the values given to `log_metric`; their mean is the metric.
        extra: column -> what was given to `log_extra`, [samples].
    """

    rewards: Tensor
    metrics: dict[str, list[float]]
    extra: dict[str, list]

    def __add__(self, other: "Scores") -> "Scores":
        """Those of further samples after these."""
        metrics = {**self.metrics}
        for name, values in other.metrics.items():
            metrics[name] = metrics.get(name, []) + values
        mine, its = len(self.rewards), len(other.rewards)
        extra = {
            name: self.extra.get(name, [None] * mine) + other.extra.get(name, [None] * its)
            for name in {**self.extra, **other.extra}
        }
        return Scores(torch.cat([self.rewards, other.rewards]), metrics, extra)

    def rows(self, numbers: list[int]) -> "Scores":
        """Those of the samples `numbers`."""
        extra = {name: [values[i] for i in numbers] for name, values in self.extra.items()}
        return Scores(self.rewards[numbers], self.metrics, extra)


def score(specs: Sequence[RewardSpec], call: RewardCall, timeout: float | None = None) -> Scores:
    """Rewards of every sample by every function. Async functions run all at once, beside the
    others, which run one after the other.

    Args:
        timeout: seconds each function may take for all samples together; None: any time. With a
            limit, functions run in a thread of their own, unless they limit themselves.
            Python cannot end a thread: one that is late is left behind, and the error is meant to
            end the run, which it does not keep alive. While a function holds the interpreter, in a
            single long operation written in C, no limit can take effect.

    Raises:
        RewardError: when a function lacks a column, raises, takes too long, or returns or logs the
            wrong number of values, or what is neither a finite number nor None.
    """
    for spec in specs:
        for name in spec.missing(call.columns):
            raise RewardError(
                f"reward function {spec.name} needs {name} at step {call.step}; there are the "
                f"columns {', '.join(sorted(call.columns))}"
            )
    metrics: dict[str, list[float]] = defaultdict(list)
    extra: dict[str, list] = defaultdict(list)
    common = {
        "trainer_state": call.trainer_state,
        "log_metric": lambda name, value: metrics[name].append(float(value)),
        "log_extra": lambda column, values: extra[column].extend(values),
    }
    given = [_given(spec.style, call, common) for spec in specs]
    work = list(zip(specs, given, strict=True))
    started = _start_async([pair for pair in work if pair[0].is_async], call.step, timeout)
    outputs = {
        spec.name: _run(spec, samples, call.step, timeout)
        for spec, samples in work
        if not spec.is_async
    }
    outputs |= _finish_async(started, call.step, timeout)
    count = len(call.prompts)
    columns = []
    for spec in specs:
        output = outputs[spec.name]
        together = output if spec.style == "per_sample" else output[0]
        columns.append(_checked(spec.name, call.step, together, count))
    for column, values in extra.items():
        if len(values) != count:
            raise RewardError(
                f"log_extra({column!r}) got {len(values)} values for {count} completions at step "
                f"{call.step}"
            )
    rewards = [[math.nan if r is None else r for r in column] for column in columns]
    return Scores(torch.tensor(rewards, dtype=torch.float32).T, dict(metrics), dict(extra))


def _given(style: str, call: RewardCall, common: dict) -> list[dict]:
    """The arguments of each call of a function of this style, by name: of one call, or of one for
    each sample."""
    columns = {name: values for name, values in call.columns.items() if name not in WITHHELD}
    columns["completion_ids"] = call.completion_ids
    if style == "per_sample":
        columns |= {
            "prompt": [text_of(prompt) for prompt in call.prompts],
            "response": [text_of(completion) for completion in call.completions],
        }
        return [
            {name: values[i] for name, values in columns.items()} | common
            for i in range(len(call.prompts))
        ]
    if style == "responses":
        columns["responses"] = [text_of(completion) for completion in call.completions]
        truths = [name for name in GROUND_TRUTHS if name in call.columns]
        if truths:
            columns["ground_truths"] = call.columns[truths[0]]
    else:
        columns |= {"prompts": call.prompts, "completions": call.completions}
    return [columns | common]


def _run(spec: RewardSpec, given: list[dict], step: int, timeout: float | None) -> list:
    """What each call of a function returns."""

    def calls() -> list:
        return [spec.invoke(arguments) for arguments in given]

    try:
        if timeout is None or spec.limits_itself:
            return calls()
        outcome = _in_thread(spec.name, calls)
        if futures.wait([outcome], timeout).done:
            return outcome.result()
    except Exception as error:
        raise _failure(spec.name, step, error) from error
    raise _lateness(spec.name, step, timeout)


def _in_thread(name: str, work: Callable) -> futures.Future:
    """The outcome of `work()` in a thread that does not keep the process alive."""
    outcome: futures.Future = futures.Future()
    chosen = device.torch_device()

    def run() -> None:
        device.enter_thread(chosen)
        try:
            outcome.set_result(work())
        except BaseException as error:  # carried to the thread that waits
            outcome.set_exception(error)

    Thread(target=run, name=f"reward {name}", daemon=True).start()
    return outcome


def _start_async(
    work: list[tuple[RewardSpec, list[dict]]], step: int, timeout: float | None
) -> dict[str, futures.Future]:
    """Starts the functions; the outcome of each by name."""

    async def run(spec: RewardSpec, given: list[dict]) -> list:
        try:
            async with asyncio.timeout(timeout) as limit:
                return await asyncio.gather(*(spec.invoke(arguments) for arguments in given))
        except Exception as error:
            if limit.expired():
                raise _lateness(spec.name, step, timeout) from error
            raise _failure(spec.name, step, error) from error

    def start(coroutine: Coroutine) -> futures.Future:
        return asyncio.run_coroutine_threadsafe(coroutine, event_loop())

    return {spec.name: start(run(spec, given)) for spec, given in work}


def _finish_async(
    started: dict[str, futures.Future], step: int, timeout: float | None
) -> dict[str, list]:
    """What each call of each function returned."""
    longest = None if timeout is None else timeout + GRACE_SECONDS
    waiting = futures.wait(started.values(), longest).not_done
    if waiting:
        names = ", ".join(name for name, outcome in started.items() if outcome in waiting)
        raise RewardError(
            f"async reward functions ({names}) took more than {timeout:g} s at step {step}, and "
            "one of them blocks the event loop"
        )
    return {name: outcome.result() for name, outcome in started.items()}


def _checked(name: str, step: int, output: Any, count: int) -> list[float | None]:
    """The output of a function as numbers."""
    output = output.tolist() if hasattr(output, "tolist") else output
    if not isinstance(output, Sequence) or isinstance(output, str):
        raise RewardError(
            f"reward function {name} returned a {type(output).__name__} at step {step}; a list of "
            f"{count} numbers is needed, one for each completion"
        )
    rewards = [r.item() if isinstance(r, Tensor) and r.ndim == 0 else r for r in output]
    if len(rewards) != count:
        raise RewardError(
            f"reward function {name} returned {len(rewards)} values for {count} completions at "
            f"step {step}"
        )
    for place, reward in enumerate(rewards):
        if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
            raise _bad_value(name, step, reward, place, "a finite number or None")
    return [None if reward is None else float(reward) for reward in rewards]


def _bad_value(name: str, step: int, value: Any, place: int, needed: str) -> RewardError:
    return RewardError(
        f"reward function {name} returned {value!r} ({type(value).__name__}) for completion "
        f"{place} at step {step}; {needed} is needed"
    )


def _failure(name: str, step: int, error: Exception) -> RewardError:
    return RewardError(
        f"reward function {name} failed at step {step}: {type(error).__name__}: {error}"
    )


def _lateness(name: str, step: int, seconds: float) -> RewardError:
    return RewardError(f"reward function {name} took more than {seconds:g} s at step {step}")
