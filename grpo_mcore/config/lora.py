"""What a trainer's `peft_config` asks for, checked. PEFT itself need not be installed."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

from grpo_mcore.config.bounds import check_bounds
from grpo_mcore.config.sections import LoraConfig
from grpo_mcore.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SERVED = {field.name for field in fields(LoraConfig)} - {"path"}
_ONLY = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_core", "megatron_config", "qalora_group_size",
}  # fmt: skip
"""PEFT's options that change nothing about the adapters of the models here."""


def read_lora_config(key: str, given: object) -> LoraConfig:
    """The adapters that setting `key` asks for, their target modules named one by one.

    Args:
        given: our LoraConfig, a `peft.LoraConfig`, the options of either as a dict, or a `path`.

    Raises:
        ConfigError: when it is none of these, for an option that is not supported, and for a value
            that cannot work or is not that of the adapter at `path`.
    """
    lora = _parse(key, _options(key, given))
    if lora.path is None:
        return lora
    stored, default = _parse(key, _read_file(key, lora.path)), LoraConfig()
    for name in _SERVED:
        value, held = getattr(lora, name), getattr(stored, name)
        if value not in (held, getattr(default, name)):
            raise ConfigError(f"{key}.{name}={value}: the adapter in {lora.path} has {held}")
    return replace(stored, path=lora.path)


def _options(key: str, given: object) -> dict:
    if isinstance(given, (str, Path)):
        return {"path": str(given)}
    if isinstance(given, LoraConfig):
        return asdict(given)
    if isinstance(given, dict):
        return given
    if hasattr(given, "peft_type"):
        return given.to_dict()
    raise ConfigError(
        f"{key}={given!r}: give a peft.LoraConfig, its options as a dict, or the directory of an "
        "adapter"
    )


def _read_file(key: str, path: str) -> dict:
    file, where = Path(path) / ADAPTER_CONFIG, f"{key}.path={path}"
    if not file.is_file():
        raise ConfigError(f"{where}: no {ADAPTER_CONFIG} there; give an adapter's directory")
    try:
        options = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{where}: its {ADAPTER_CONFIG} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: its {ADAPTER_CONFIG} is not a JSON object")
    targets = options.get("target_modules")
    if isinstance(targets, list):
        # PEFT may list every layer's by its full name; which ones there are, the tensors say.
        options["target_modules"] = [name.rpartition(".")[2] for name in targets]
    return options


def _parse(key: str, options: dict) -> LoraConfig:
    for name, value in options.items():
        if name in _ONLY and value != _ONLY[name]:
            raise ConfigError(f"{key}.{name}={value}: only {_ONLY[name]} is supported")
        # PEFT leaves an option that is off empty in one way or another.
        if value and name not in {*_SERVED, *_ONLY, *_WITHOUT_EFFECT, "path"}:
            raise ConfigError(f"{key}.{name}={value}: is not supported; leave it out")
    given = {k: v for k, v in options.items() if k in {*_SERVED, "path"} and v is not None}
    lora = LoraConfig(**given)
    lora.target_modules = _targets(f"{key}.target_modules", lora.target_modules)
    check_bounds(lora, f"{key}.")
    return lora


def _targets(key: str, given: str | list[str]) -> list[str]:
    names = {given} if isinstance(given, str) else set(given)
    if names == {ALL_LINEAR}:
        return list(TARGETS)
    for name in sorted(names):
        if isinstance(given, str) or name not in TARGETS:
            raise ConfigError(f"{key}={name}: give a list of {', '.join(TARGETS)}, or {ALL_LINEAR}")
    if not names:
        raise ConfigError(f"{key}: is empty; give some of {', '.join(TARGETS)}, or {ALL_LINEAR}")
    return [name for name in TARGETS if name in names]
