"""Functions that a configuration names."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from grpo_mcore.errors import ConfigError


def load_function(key: str, name: str, directory: Path) -> Callable:
    """The function of `name`, "package.module:function", the value of setting `key`. Its package
    may lie in `directory`: torchrun starts scripts from elsewhere.

    Raises:
        ConfigError: when there is none.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{key}: must be package.module:function")
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: {error}") from error
