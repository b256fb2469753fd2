"""Adapters in PEFT's files: which tensors there are, their sizes, and whether they suit a model."""

from grpo_mcore.config import LoraConfig
from grpo_mcore.config.lora import ADAPTER_WEIGHTS
from grpo_mcore.errors import ConfigError, FilesError
from grpo_mcore.models.expected import hf_sizes
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.shape import ModelShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_lora(key: str, lora: LoraConfig, shape: ModelShape) -> None:
    """Checks `lora`, the value of setting `key`, against the model it is to adapt.

    Raises:
        ConfigError: for targets in a mixture of experts.
        FilesError: when the adapter at its `path` is damaged or another model's.
    """
    experts = [name for name in lora.target_modules if name not in ATTENTION]
    if shape.experts and experts:
        raise ConfigError(
            f"{key}.target_modules={','.join(experts)}: experts cannot have adapters; for a "
            f"{shape.family} model give some of {', '.join(ATTENTION)}"
        )
    if lora.path:
        open_adapter(lora, shape)


def adapter_sizes(shape: ModelShape, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The size of every one of PEFT's tensors, by name."""
    sizes = {}
    for name, size in hf_sizes(shape).items():
        if is_adapted(name, lora):
            outputs, inputs = size
            a, b = pair_names(name)
            sizes |= {a: (lora.r, inputs), b: (outputs, lora.r)}
    return sizes


def open_adapter(lora: LoraConfig, shape: ModelShape) -> HFReader:
    """The adapter at `lora.path`. Raises FilesError when its tensors are not what `shape` needs."""
    reader, sizes = HFReader(lora.path, file=ADAPTER_WEIGHTS), adapter_sizes(shape, lora)
    for name, size in sizes.items():
        if tuple(reader.shape(name)) != size:
            raise FilesError(
                f"{lora.path}: tensor {name} is {reader.shape(name)}; the model needs {list(size)}"
            )
    for name in reader.names:
        if name not in sizes:
            raise FilesError(f"{lora.path}: tensor {name} is of no matrix that can be adapted")
    return reader


def is_adapted(name: str, lora: LoraConfig) -> bool:
    return name.endswith(".weight") and module_of(name) in lora.target_modules


def module_of(name: str) -> str:
    """ "q_proj" of "model.layers.0.self_attn.q_proj.weight"."""
    return name.split(".")[-2]


def pair_names(name: str) -> list[str]:
    module = name.removesuffix(".weight")
    return [f"base_model.model.{module}.{kind}.weight" for kind in ("lora_A", "lora_B")]
