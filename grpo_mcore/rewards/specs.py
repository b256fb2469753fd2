"""What can serve as a reward: functions of three call styles, and models.

Style         of         called with                              returns
"batch"       TRL, ATLAS prompts, completions, completion_ids     a number for each completion
"per_sample"  NeMo RL    prompt and response, as text             a number
"responses"   Unsloth    responses, as texts, and ground_truths   a number for each response

The style is read off the names of a function's parameters. None in place of a number leaves the
function out for that sample. Every style may be `async`. Further parameters are filled by name:
columns of the dataset (the sample's own value in "per_sample"), `trainer_state`, `log_metric` and
`log_extra`; a function gets only those it names, or all where it takes **kwargs.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from grpo_mcore.data.questions import GROUND_TRUTHS
from grpo_mcore.errors import ConfigError
from grpo_mcore.rewards.model import RewardModel

STYLES = {
    "batch": ("prompts", "completions"),
    "per_sample": ("prompt", "response"),
    "responses": ("responses", "ground_truths"),
}
"""Style -> its first two parameters."""
OFFERED = {"completion_ids", "trainer_state", "log_metric", "log_extra"}
"""What every style is offered beside its own two and the columns."""
WITHHELD = {"prompt", "completion", "completion_ids"}
"""Columns that are not passed on, as in TRL."""

RewardSource = Callable | str | nn.Module
"""A function, a sequence-classification model, or the path or hub id of one."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def reward(style: str | None = None, limits_itself: bool = False) -> Callable:
    """A decorator that says what a reward function's signature does not.

    Args:
        style: one of STYLES. Where the parameters' names do not say the same, the first two are
            the style's own, whatever they are called; further ones are filled by name.
        limits_itself: the function, which is not async, ends in time by means of its own, such as
            signals, that may need the main thread: it is called in the thread that asks for the
            scores, without `reward_timeout`.

    Raises:
        ConfigError: for an unknown style.
    """
    if style is not None and style not in STYLES:
        raise ConfigError(f"@reward(style={style!r}): choose one of {', '.join(STYLES)}")

    def mark(function: Callable) -> Callable:
        function.reward_style, function.limits_itself = style, limits_itself
        return function

    return mark


@dataclass(frozen=True)
class RewardSpec:
    """A reward function or RewardModel as a trainer uses it.

    Attributes:
        name: unique among a trainer's, for `rewards/<name>/mean`.
        style: one of STYLES.
    """

    function: Callable
    name: str
    weight: float
    style: str

    @property
    def is_async(self) -> bool:
        inner = _innermost(self.function)
        return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)

    @property
    def limits_itself(self) -> bool:
        return bool(_mark(self.function, "limits_itself"))

    def asks_for(self, column: str) -> bool:
        """Whether the function names `column` among its parameters; taking all is not asking."""
        return any(p.name == column for p in self._split()[1])

    def missing(self, columns: Iterable[str]) -> list[str]:
        """Parameters that nothing fills where the dataset has `columns`."""
        columns = set(columns)
        filled = (columns - WITHHELD) | OFFERED | set(STYLES[self.style])
        if self.style == "responses" and not columns & set(GROUND_TRUTHS):
            filled.remove("ground_truths")
        placed, parameters = self._split()
        needed = {p.name for p in parameters if p.default is p.empty and p.kind in _BY_NAME}
        return sorted((needed | set(placed)) - filled)

    def invoke(self, given: dict):
        """Calls the function with what it takes of `given`, which is by name."""
        placed, parameters = self._split()
        names = {p.name for p in parameters if p.kind in _BY_NAME}
        if _takes_all(parameters):
            names = given.keys() - set(placed)
        taken = {name: given[name] for name in names & given.keys() - _bound(self.function)}
        return self.function(*(given[name] for name in placed), **taken)

    def _split(self) -> tuple[Sequence[str], list[inspect.Parameter]]:
        """What goes by place, and the parameters filled by name."""
        parameters = _parameters(self.function)
        if _style_by_names(parameters) == self.style:
            return (), parameters
        first = [p for p in parameters if p.kind in _BY_PLACE][:2]
        return STYLES[self.style], [p for p in parameters if p not in first]


def as_reward_specs(
    reward_funcs,
    weights: Sequence[float] | None = None,
    processing_classes=None,
    columns: Iterable[str] | None = None,
    chat_template_kwargs: dict | None = None,
) -> list[RewardSpec]:
    """Registers a trainer's rewards; no model is loaded yet.

    Args:
        reward_funcs: a callable, the path or hub id of a sequence-classification model or such a
            model, or a list of these.
        weights: `reward_weights`, one for each; None: all 1.
        processing_classes: `reward_processing_classes`, the models' tokenizers: one, or a list with
            one (or None) for each reward; None: each model's own.
        columns: what the dataset and the trainer offer functions by name, where that is known.
        chat_template_kwargs: for the models' chat templates.

    Raises:
        ConfigError: for anything that could not be called, scored or weighed.
    """
    functions = listed(reward_funcs)
    if not functions:
        raise ConfigError(f"reward_funcs={reward_funcs}: give at least one reward function")
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ConfigError(
            f"reward_weights={weights}: {len(weights)} for {len(functions)} reward functions; "
            "give one for each"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise ConfigError(f"reward_weights={weights}: give finite numbers")
    tokenizers = listed(processing_classes) or [None] * len(functions)
    if len(tokenizers) != len(functions):
        raise ConfigError(
            f"reward_processing_classes: {len(tokenizers)} for {len(functions)} reward functions; "
            "give one (or None) for each"
        )
    specs: list[RewardSpec] = []
    for place, function in enumerate(functions):
        key = f"reward_funcs[{place}]"
        if isinstance(function, str) or (
            isinstance(function, nn.Module) and hasattr(function, "config")
        ):
            function = RewardModel(key, function, tokenizers[place], chat_template_kwargs)
        name = callable_name(function)
        style = _style(f"{key}={name}", function)
        taken = {spec.name for spec in specs}
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        unique = name if name not in taken else next(n for n in numbered if n not in taken)
        specs.append(RewardSpec(function, unique, float(weights[place]), style))
        missing = [] if columns is None else specs[-1].missing(columns)
        if missing:
            raise ConfigError(
                f"{key}={name}: nothing fills its parameter {missing[0]}; there are the columns "
                f"{', '.join(sorted(columns))}"
            )
    return specs


def callable_name(function: Callable) -> str:
    """The name TRL logs a reward function under."""
    inner = _innermost(function)
    return getattr(inner, "__name__", type(inner).__name__)


def listed(value: Any) -> list:
    """What an argument holds that may be one thing, several, or None."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _style(where: str, function) -> str:
    """The style of `function`, the reward `where` tells of."""
    if not callable(function) or isinstance(function, type):
        raise ConfigError(
            f"{where}: a reward is a function, a callable object, the path or hub id of a "
            "sequence-classification model, or such a model"
        )
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError) as error:  # of what is written in C
        raise ConfigError(
            f"{where}: its signature cannot be read ({error}); wrap it in a function"
        ) from error
    named, marked = _style_by_names(parameters), _mark(function, "reward_style")
    if marked is None and named is None:
        raise ConfigError(
            f"{where}: its parameters ({', '.join(map(str, parameters))}) do not say how to call "
            "it; use (prompts, completions, **kwargs), (prompt, response) or (responses, "
            "ground_truths), or decorate it with @reward(style=...), style one of "
            f"{', '.join(STYLES)}"
        )
    if marked not in (None, named):
        room = sum(p.kind in _BY_PLACE for p in parameters)
        if room < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise ConfigError(
                f"{where}: @reward(style={marked!r}) needs two parameters, for "
                f"{' and '.join(STYLES[marked])}; it has ({', '.join(map(str, parameters))})"
            )
    return marked or named


def _style_by_names(parameters: list[inspect.Parameter]) -> str | None:
    """The style the names of the parameters speak of; None where they speak of none or several."""
    names = {p.name for p in parameters if p.kind in _BY_NAME}
    if "completions" in names:
        return "batch"
    marks = {"batch": {"prompts"}, "per_sample": {"prompt", "response"}, "responses": {"responses"}}
    found = [style for style, words in marks.items() if names & words]
    if not found and ("completion_ids" in names or _takes_all(parameters)):
        return "batch"
    return found[0] if len(found) == 1 else None


def _takes_all(parameters: list[inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def _parameters(function: Callable) -> list[inspect.Parameter]:
    """The parameters left to fill."""
    bound = _bound(function)
    return [p for p in inspect.signature(function).parameters.values() if p.name not in bound]


def _bound(function: Callable) -> set[str]:
    """What functools.partial has bound by name: no column of that name takes its place."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        bound |= function.keywords.keys()
        function = function.func
    return bound


def _innermost(function: Callable) -> Callable:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _mark(function: Callable, name: str):
    """What @reward has said of the function, its class or its `__call__`."""
    inner = _innermost(function)
    return getattr(inner, name, getattr(inner.__call__, name, None))
