"""Environments: what they are, and their registration."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from grpo_mcore.data.chat import Text
from grpo_mcore.errors import ConfigError, KnownError

_OWN = ("reset", "get_reward")
"""Public methods that are no tools."""


class EnvironmentFailure(KnownError, RuntimeError):
    """An environment raised or returned what cannot be used; the text names it and the method."""


class StepResult(NamedTuple):
    """An environment's answer to a turn of the model.

    Attributes:
        observation: what the model is told next, as a user's message or as messages; as text where
            the prompt is text. Not used where the conversation is done.
        reward: for this turn.
    """

    observation: str | list[dict] | None
    reward: float
    done: bool


class Environment(Protocol):
    """What an environment looks like; it need not derive from this class. Each sample has an
    instance of its own. Both methods may be async.

    The other kind is that of TRL's environment_factory: no `step`, but public methods, which are
    tools with types and Google docstrings; and, if it gives a reward, `get_reward()`, asked for
    once when the conversation is over.
    """

    def reset(self, prompt: Text, **columns) -> str | list[dict] | None:
        """Begins; given of the dataset's columns those it names, or all where it takes **kwargs.

        Returns:
            A first observation: text to add to the prompt's last message, or messages to add to the
            prompt, or None.
        """

    def step(self, response: str) -> StepResult:
        """Answers the model's `response`."""


@dataclass(frozen=True)
class EnvironmentSpec:
    """An environment as a trainer uses it.

    Attributes:
        name: of its class.
        create: makes one for a sample.
        steps: whether it answers each turn, by `step`; otherwise its methods are tools.
        gives_reward: whether `Conversation.reward` will be a number.
        methods: its class's functions that are tools.
    """

    name: str
    create: Callable[[], Any]
    steps: bool
    gives_reward: bool
    methods: list[Callable]


def check_environment(environment) -> EnvironmentSpec:
    """Registers an environment.

    Args:
        environment: a class that needs no arguments, a function that makes one, for which it is
            called once now, or an instance, of which each sample gets a deep copy.

    Raises:
        ConfigError: for anything else, and what has neither `step` nor methods that could be tools.
    """
    kind, create = _kind(environment)
    steps = callable(getattr(kind, "step", None))
    methods = [
        function
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not steps and not name.startswith("_") and name not in _OWN
    ]
    if not steps and not methods:
        raise ConfigError(
            f"environment={kind.__name__}: has neither step(response) nor methods that are tools"
        )
    gives_reward = steps or callable(getattr(kind, "get_reward", None))
    return EnvironmentSpec(kind.__name__, create, steps, gives_reward, methods)


def _kind(environment) -> tuple[type, Callable[[], Any]]:
    """Its class, and what makes one."""
    wanted = (
        "an environment is a class, a function that makes one or an instance, with "
        "reset(prompt, **columns) and step(response)"
    )
    if _resets(environment) and not isinstance(environment, type):
        try:
            copy.deepcopy(environment)
        except TypeError as error:
            raise ConfigError(
                f"environment={type(environment).__name__}: each sample needs a copy, and it "
                f"cannot be copied ({error}); give its class or a function that makes one"
            ) from error
        return type(environment), lambda: copy.deepcopy(environment)
    if not callable(environment):
        raise ConfigError(f"environment={environment!r}: {wanted}")
    name = getattr(environment, "__name__", type(environment).__name__)
    try:
        inspect.signature(environment).bind()
    except TypeError as error:
        raise ConfigError(
            f"environment={name}: it is called without arguments, but {error}; give a function "
            "that makes one, or an instance"
        ) from error
    kind = environment if isinstance(environment, type) else type(environment())
    if not _resets(kind):
        raise ConfigError(f"environment={name}: {kind.__name__} has no reset; {wanted}")
    return kind, environment


def _resets(environment) -> bool:
    return callable(getattr(environment, "reset", None))
