"""Errors that explain themselves in one line; rooms derive their own from `KnownError`."""

import difflib
from collections.abc import Iterable


class KnownError(Exception):
    """An error whose text says what is wrong and where; the command line prints no traceback."""


class PhaseTimeout(KnownError, RuntimeError):
    """A named phase waited past its deadline."""


class FilesError(KnownError, ValueError):
    """Files of a model or checkpoint that are missing, damaged, or not what they should be."""


class MismatchError(KnownError, RuntimeError):
    """Trainer and engine disagree by more than `rollout.mismatch_stop`."""


class ConfigError(KnownError, ValueError):
    """A setting that cannot work: one line naming the key, its value and what would fit."""


def one_line(error: BaseException) -> str:
    """What `error` says, without line breaks; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    """The error for `key`, with the nearest of the `known` keys: of the same name in another
    section, or else of a similar name, in its own section first."""
    leaf_of = {k: k.rpartition(".")[2] for k in known}
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in leaf_of if k.rpartition(".")[0] == section]
    near = [k for k in leaf_of if leaf_of[k] == leaf]
    for keys in (siblings, list(leaf_of)):
        if not near:
            leaves = difflib.get_close_matches(leaf, {leaf_of[k] for k in keys}, 1)
            near = [k for k in keys if leaf_of[k] in leaves]
    if near:
        hint = f"did you mean {difflib.get_close_matches(key, near, 1, 0)[0]}?"
    else:
        listed = siblings or [k for k in leaf_of if "." not in k]
        hint = f"known keys: {', '.join(sorted(listed))}"
    return ConfigError(f"{key}: unknown configuration key; {hint}")
