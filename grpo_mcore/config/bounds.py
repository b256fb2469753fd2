"""What a setting may be, declared beside it, and the one check of all of them.

    epsilon: float = number(0.2, least=0)
    loss_type: str = choice("dapo", LOSS_TYPES)

Every number is finite, and no larger than LARGEST where nothing else is said.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin

from grpo_mcore.errors import ConfigError

LARGEST = 1e9
"""No setting means anything beyond it, and engines and kernels hold numbers in 32 bits."""
LONGEST_WAIT = 1e6
"""Seconds, 11 days: what waits for more overflows the milliseconds it counts in 32 bits."""


@dataclass(frozen=True)
class Range:
    """
    Attributes:
        least, above: the lower end, which belongs to the range or does not.
        most, below: the upper one.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: Real) -> bool:
        return (  # whatever is asked of nan is false
            value >= (-LARGEST if self.least is None else self.least)
            and (self.above is None or value > self.above)
            and (value <= self._most if self.below is None else value < self.below)
        )

    def __str__(self) -> str:
        return self._text(self.least, self.above, self._most, self.below)

    def refusal(self, value: Real) -> str:
        """What is wrong with a value outside of it. An end so far away that it is not the point is
        named where it is the one that was missed."""
        most = self._most
        if most >= LONGEST_WAIT and value <= most:
            most = None
        said = self._text(self.least, self.above, most, self.below)
        return f"must be {said or f'at least {_number(-LARGEST)}'}"

    @staticmethod
    def _text(
        least: float | None, above: float | None, most: float | None, below: float | None
    ) -> str:
        if below is not None:
            most = None
        if least is not None and most is not None and most < LONGEST_WAIT:
            return f"between {_number(least)} and {_number(most)}"
        ends = {"at least": least, "above": above, "below": below, "at most": most}
        return " and ".join(f"{word} {_number(e)}" for word, e in ends.items() if e is not None)

    @property
    def _most(self) -> float:
        return LARGEST if self.most is None else self.most


def _number(end: float) -> str:
    return str(int(end) if end == int(end) else end)


ANY = Range()


def number(default: Any, **ends: float) -> Any:
    """A field that is a number; the ends of its range are those of Range."""
    return field(default=default, metadata={"range": Range(**ends)})


def numbers(default: list[float] | None, **ends: float) -> Any:
    """A field that is a list of numbers, each in the range."""
    metadata = {"range": Range(**ends)}
    if default is None:
        return field(default=None, metadata=metadata)
    return field(default_factory=lambda: list(default), metadata=metadata)


def choice(default: str | None, choices: Iterable[str]) -> Any:
    """A field that is one of `choices`; where its type says so, also None."""
    return field(default=default, metadata={"choices": tuple(choices)})


def check_bounds(config: Any, prefix: str = "") -> None:
    """Checks every number, choice and switch of a configuration and of its sections.

    Args:
        prefix: of the keys, such as "rollout.".

    Raises:
        ConfigError: for the first that is not what its field declares.
    """
    for one in fields(config):
        key, value = prefix + one.name, getattr(config, one.name)
        kinds = kinds_of(one.type)
        if value is None and type(None) in kinds:
            continue
        if section := next(filter(is_dataclass, kinds), None):
            if not isinstance(value, section):
                raise ConfigError(f"{key}={value!r}: must be a {section.__name__}")
            check_bounds(value, f"{key}.")
        elif kinds == (bool,) and not isinstance(value, bool):
            raise ConfigError(f"{key}={value!r}: must be True or False")
        elif "choices" in one.metadata:
            check_choice(key, value, one.metadata["choices"])
        elif kind := _number_kind(kinds, one.default):
            for item in _items(key, value, kinds):
                _check_number(key, item, kind, one.metadata.get("range", ANY))


def kinds_of(annotation: Any) -> tuple:
    """The types of which a field holds one."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _number_kind(kinds: tuple, default: Any) -> type | None:
    """int or float, where the field holds such; of one of any type, that of its default."""
    for kind in (float, int):
        if kind in kinds or any(kind in get_args(part) for part in kinds):
            return kind
    return type(default) if Any in kinds and type(default) in (int, float) else None


def _items(key: str, value: Any, kinds: tuple) -> Iterator[Any]:
    if Any in kinds and value is True:  # as many as there are
        return
    if not any(get_origin(kind) is list for kind in kinds):
        yield value
    elif isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{key}={value!r}: must be a list of numbers")
    else:
        yield from value


def _check_number(key: str, value: Any, kind: type, allowed: Range) -> None:
    wanted = Integral if kind is int else Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        word = "whole number" if kind is int else "number"
        raise ConfigError(f"{key}={value!r}: must be a {word}, {allowed}")
    if value not in allowed:
        raise ConfigError(f"{key}={value}: {allowed.refusal(value)}")


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raises ConfigError when `value` is not one of `choices`."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}")
