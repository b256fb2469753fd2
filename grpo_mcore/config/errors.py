"""The error a user's own setting causes."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that cannot work: one line naming the key, its value and what would fit."""


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for `key`, with the nearest of the `known` keys, in its own section first."""
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    hint = ""
    for keys in (siblings, list(known)):
        leaves = difflib.get_close_matches(leaf, {k.rpartition(".")[2] for k in keys}, 1)
        same_leaf = [k for k in keys if k.rpartition(".")[2] in leaves]
        if same_leaf and not hint:
            hint = f"did you mean {difflib.get_close_matches(key, same_leaf, 1, 0)[0]}?"
    listed = siblings or [k for k in known if "." not in k]
    hint = hint or f"known keys: {', '.join(sorted(listed))}"
    return ConfigError(f"{key}: unknown configuration key; {hint}")
