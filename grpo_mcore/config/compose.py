"""From YAML files and command-line overrides to the dataclass tree, strictly.

Hydra composes; each key it would accept silently or refuse at length is checked here first, so
that a mistake is one line.
"""

import dataclasses
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grpo_mcore.config.errors import ConfigError, unknown_key
from grpo_mcore.config.schema import TeacherGRPOConfig


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a dataclass tree, sections included."""
    keys = []
    for field in dataclasses.fields(schema):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(field.type):
            keys += keys_of(field.type, f"{prefix}{field.name}.")
    return keys


def compose_config(config_dir: Path, experiment: str, overrides: list[str]) -> TeacherGRPOConfig:
    """The configuration of `config_dir/experiment/NAME.yaml` with Hydra `overrides` applied.

    Raises:
        ConfigError: for an unknown experiment or key, or a value of the wrong type.
    """
    experiments = sorted(p.stem for p in (config_dir / "experiment").glob("*.yaml"))
    if experiment not in experiments:
        raise ConfigError(f"experiment={experiment}: choose one of {', '.join(experiments)}")
    known = keys_of(TeacherGRPOConfig)
    groups = {p.name for p in config_dir.iterdir() if p.is_dir()}
    try:
        for override in OverridesParser.create().parse_overrides(overrides):
            if override.key_or_group not in groups and override.key_or_group not in known:
                raise unknown_key(override.key_or_group, known)
        ConfigStore.instance().store(name="schema", node=TeacherGRPOConfig)
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            tree = compose("config", [f"experiment={experiment}", *overrides])
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(f"{missing[0]}: no value; give one, as in {missing[0]}=...")
        return OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise _one_line(error, known) from error


def _one_line(error: Exception, known: list[str]) -> ConfigError:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    if key and key not in known:
        return unknown_key(key, known)
    text = " ".join(str(cause).split())
    return ConfigError(f"{key}: {text}" if key else text)
