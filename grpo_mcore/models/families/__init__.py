"""One module per model family: `shape(hf, where)` maps its configuration, `rules(shape,
fused_norms)` its weights. To add a family, write the module and name it here."""

import json
from pathlib import Path

from transformers import AutoConfig

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
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{key}={path}: its config.json is not JSON: {error}") from error
    return shape_of(raw, f"{key}={path}")


def shape_of(raw: dict, where: str) -> ModelShape:
    """The shape that the contents of a config.json describe; `where` names it in errors.

    Raises:
        ConfigError: when the family or one of its variants is not supported.
    """
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: model family {model_type!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if raw.get("quantization_config"):
        raise ConfigError(f"{where}: a quantised checkpoint cannot be trained; give a plain one")
    try:
        # Completes it with the family's defaults and brings old forms into the new one.
        hf = AutoConfig.for_model(**raw).to_dict()
    except Exception as error:  # transformers' checks have no common type
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: its config.json cannot be used: {reason}") from error
    shape = FAMILIES[model_type].shape(hf, where)
    _check_sizes(shape, where)
    return shape


def _check_sizes(shape: ModelShape, where: str) -> None:
    for name in ("hidden", "ffn", "layers", "heads", "groups", "head_dim", "vocab", "positions"):
        if getattr(shape, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(shape, name)} by its config.json")
    if shape.window is not None and shape.window < 1:
        raise ConfigError(f"{where}: sliding_window={shape.window} reaches nothing")
    if shape.experts and not 1 <= shape.experts_per_token <= shape.experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok={shape.experts_per_token}, of {shape.experts} experts"
        )
    if shape.experts and shape.experts_per_token == 1 and not shape.weigh_all_experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok=1 with renormalised weights, which are then all 1, is "
            "not supported"
        )
