"""The error a user's own setting causes."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot work: one line naming the key, its value and what would fit."""


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for `key`, with the nearest of the `known` keys."""
    known = sorted(known)
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, 1, 0.6) or [
        k for k in known if k.rsplit(".", 1)[-1] == leaf
    ]
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return ConfigError(f"{key}: unknown configuration key; {hint}")
