"""From YAML files and command-line overrides to the dataclass tree, strictly.

Hydra composes; each key it would accept silently or refuse at length is checked here first, so
that a mistake is one line.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from grpo_mcore.config.trainers import TeacherGRPOConfig
from grpo_mcore.errors import ConfigError, unknown_key

Section = typing.TypeVar("Section")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def keys_of(schema: type, prefix: str = "") -> dict[str, type]:
    """Types of all fields of a dataclass tree by dotted name, sections included."""
    keys = {}
    for field in dataclasses.fields(schema):
        keys[prefix + field.name] = field.type
        for part in typing.get_args(field.type) or [field.type]:  # of "LoraConfig | None", both
            if dataclasses.is_dataclass(part):
                keys |= keys_of(part, f"{prefix}{field.name}.")
    return keys


def compose_config(config_dir: Path, experiment: str, overrides: list[str]) -> TeacherGRPOConfig:
    """The configuration of `config_dir/experiment/NAME.yaml` with Hydra `overrides` applied.

    Raises:
        ConfigError: for an unknown experiment or key, or a value of the wrong type.
    """
    overrides = [f"experiment={experiment}", *overrides]
    groups = {
        group.name: sorted(option.stem for option in group.glob("*.yaml"))
        for group in config_dir.iterdir()
        if group.is_dir()
    }
    known = keys_of(TeacherGRPOConfig)
    for override in overrides:
        _check_override(override, groups, known)
    parsed = OverridesParser.create().parse_overrides(overrides)
    try:
        ConfigStore.instance().store(name="schema", node=TeacherGRPOConfig)
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            chosen = [o.input_line for o in parsed if o.key_or_group in groups]
            tree = compose("config", chosen)
        for override in parsed:
            if override.key_or_group not in groups:
                _set(tree, override.key_or_group, override.value(), known)
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(f"{missing[0]}: no value; give one, as in {missing[0]}=...")
        return OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _one_line(error, known) from error


def read_section(path: str, schema: type[Section]) -> Section:
    """The settings of dataclass `schema` in the YAML file `path`.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    try:
        tree = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        return OmegaConf.to_object(tree)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise ConfigError(f"{path}: {_one_line(error, keys_of(schema))}") from error


def read_settings(option: str, file: Path) -> Mapping[str, Any]:
    """What a YAML file of settings holds.

    Raises:
        ConfigError: naming `option`, for a file that cannot be read or holds none.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{option}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{option}: must be a YAML file of settings")
    return content


def override_config(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> TeacherGRPOConfig:
    """The configuration that a run has `saved` (nothing: the default one), with `settings`, whose
    keys may be dotted. What has no value anywhere is "".

    Raises:
        ConfigError: for an unknown key, or a value of the wrong type.
    """
    known = keys_of(TeacherGRPOConfig)
    try:
        tree = OmegaConf.merge(OmegaConf.structured(TeacherGRPOConfig), saved)
        for key, value in settings.items():
            if key not in known:
                raise unknown_key(key, known)
            if dataclasses.is_dataclass(value):
                value = dataclasses.asdict(value)
            _set(tree, key, value, known)
        for key in OmegaConf.missing_keys(tree):
            OmegaConf.update(tree, key, "")
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise _one_line(error, known) from error


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Hydra overrides, KEY=VALUE each, as keys and values.

    Raises:
        ConfigError: for one that is none.
    """
    known = keys_of(TeacherGRPOConfig)
    for text in texts:
        _check_override(text, {}, known)
    parsed = OverridesParser.create().parse_overrides(texts)
    return {override.key_or_group: override.value() for override in parsed}


def _set(tree: DictConfig, key: str, value: Any, known: dict[str, type]) -> None:
    """Gives `key`, which may be dotted, a value. A section that is null has its defaults first:
    neither Hydra nor OmegaConf can set a part of such a one."""
    section, _, part = key.partition(".")
    has_parts = any(name.startswith(f"{section}.") for name in known)
    if (part or (has_parts and value is not None)) and OmegaConf.select(tree, section) is None:
        tree.merge_with({section: {}})
    OmegaConf.update(tree, key, value)


def _check_override(text: str, groups: dict[str, list[str]], known: dict[str, type]) -> None:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise _not_key_value(text) from error
    key = override.key_or_group
    if not key:
        raise _not_key_value(text)
    if key not in groups and key not in known:
        raise unknown_key(key, known.keys() | groups.keys())
    plain = override.type is OverrideType.CHANGE and override.package is None
    if not plain or override.is_sweep_override():
        raise _not_key_value(text)
    if key in groups and override.value() not in groups[key]:
        raise ConfigError(f"{text}: choose one of {', '.join(groups[key])}")


def _not_key_value(text: str) -> ConfigError:
    return ConfigError(
        f"{text or repr(text)}: expected KEY=VALUE; a value with spaces, commas or braces needs "
        "quotes of its own, such as \"KEY='a, b'\""
    )


def _one_line(error: Exception, known: dict[str, type]) -> ConfigError:
    cause, inner = error, error
    while inner := inner.__cause__ or inner.__context__:
        if getattr(inner, "full_key", None):
            cause = inner
    key = getattr(cause, "full_key", None)
    if key and key not in known:
        return unknown_key(key, known)
    if key and isinstance(cause, ValidationError):
        value = "null" if str(cause.value) == "None" else cause.value
        return ConfigError(f"{key}={value}: expected {_kind(known[key])}")
    text = " ".join(str(cause if key else error).partition("full_key:")[0].split())
    return ConfigError(f"{key}: {text}" if key else text)


def _kind(expected: type) -> str:
    if dataclasses.is_dataclass(expected):
        return "a section with " + ", ".join(f.name for f in dataclasses.fields(expected))
    return _KINDS.get(expected, str(expected))
