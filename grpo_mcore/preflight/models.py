"""Models and what is trained of them, against their files and the settings."""

from typing import Any, TypeVar

from grpo_mcore.config import ConfigError, ModelConfig, TrainingConfig
from grpo_mcore.data.tokenizer import Tokenizer, load_tokenizer
from grpo_mcore.models.adapter_files import check_lora
from grpo_mcore.models.expected import check_weights
from grpo_mcore.models.families import read_shape
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.models.transformer_engine import check_fp8_sizes, read_facts
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.preflight.batches import with_batches
from grpo_mcore.preflight.layouts import choose_layout
from grpo_mcore.preflight.settings import check_model, check_optimizer, check_training

Config = TypeVar("Config", bound=TrainingConfig)


def open_model(
    config: Config, world_size: int, tokenizer: Any
) -> tuple[Config, Layout, ModelShape, Tokenizer]:
    """Layout, shape and tokenizer of the one model of `config`, all checked.

    Args:
        tokenizer: transformers' one in place of the model's own, or None.

    Returns:
        First the configuration with numbers for the batch sizes it left open.

    Raises:
        ConfigError: for the first setting found that cannot work.
    """
    check_training(config)
    check_model("model", config.model)
    check_optimizer(config, "model", config.model, read_facts())
    shape = read_shape("model.path", config.model.path)
    check_fp8_sizes("model", config.model, shape)
    check_adapters(config, config.model, shape)
    layout = choose_layout(config, shape, world_size)
    check_weights("model.path", config.model.path, shape)
    own = load_tokenizer("model.path", config.model.path, tokenizer)
    return with_batches(config, layout.data), layout, shape, own


def check_reference(path: str, shape: ModelShape) -> None:
    """Checks the model in directory `path`, the reference of one of `shape`."""
    if read_shape("ref_model", path) != shape:
        raise ConfigError(f"ref_model={path}: is not of the shape of the model that is trained")
    check_weights("ref_model", path, shape)


def check_adapters(config: TrainingConfig, model: ModelConfig, shape: ModelShape) -> None:
    """Checks the adapters that `config` asks for, if any, against the model they adapt."""
    if config.peft_config is None:
        return
    check_lora("peft_config", config.peft_config, shape)
    for key in ("fp8", "fp8_param"):
        if getattr(model, key):
            raise ConfigError(f"peft_config: adapters cannot be trained beside {key}")
