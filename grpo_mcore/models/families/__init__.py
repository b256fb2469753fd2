"""One module per model family: `shape(hf, where)` maps its config.json, `rules(shape, fused_norms)`
maps its weights. To add a family, write the module and name it here."""

import json
from pathlib import Path

from grpo_mcore.errors import ConfigError
from grpo_mcore.models.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from grpo_mcore.models.shape import ModelShape

FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def read_shape(key: str, path: str) -> ModelShape:
    """The shape of the model in directory `path`, which is the value of setting `key`.

    Raises:
        ConfigError: when there is no such directory or config.json, or the family or one of its
            variants is not supported.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{key}={path}: no config.json there; give a Hugging Face model directory"
        )
    try:
        hf = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{key}={path}: its config.json is not JSON: {error}") from error
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{key}={path}: model family {model_type!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if hf.get("quantization_config"):
        raise ConfigError(
            f"{key}={path}: a quantised checkpoint cannot be trained; give a plain one"
        )
    try:
        return FAMILIES[model_type].shape(hf, f"{key}={path}")
    except KeyError as error:
        raise ConfigError(f"{key}={path}: its config.json lacks {error}") from error
