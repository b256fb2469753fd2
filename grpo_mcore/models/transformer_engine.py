"""Whose layers a model is made of, Transformer Engine's or Megatron's own, and their FP8 recipes.

What can run is decided from facts of the device, which are read in one place.
"""

from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import ModuleList, Parameter

from grpo_mcore import device
from grpo_mcore.config import ModelConfig
from grpo_mcore.errors import ConfigError
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

OLDEST = (2, 9)
"""The first Transformer Engine that Megatron-Core 0.16 is made for."""


@dataclass(frozen=True)
class Recipe:
    """What Transformer Engine needs for an FP8 recipe.

    Attributes:
        number_format: "hybrid" is E4M3 forward and E5M2 backward.
        oldest, newest: compute capabilities from, and up to but without, which it runs.
        cuda: the oldest version of CUDA.
        multiple: by which both sizes of every matrix divide.
    """

    number_format: str
    oldest: tuple[int, int]
    newest: tuple[int, int] = (99, 0)
    cuda: tuple[int, int] = (12, 1)
    multiple: int = 16


RECIPES = {
    "delayed": Recipe("hybrid", (8, 9)),
    "tensorwise": Recipe("hybrid", (8, 9)),
    "blockwise": Recipe("e4m3", (9, 0), cuda=(12, 9)),
    "mxfp8": Recipe("e4m3", (10, 0), newest=(12, 0), multiple=32),
}
BLOCK = 128
"""Elements of a block of recipe "blockwise"."""


@dataclass(frozen=True)
class DeviceFacts:
    """What the choice of layers depends on.

    Attributes:
        capability: the GPU's compute capability; None: there is no GPU.
        cuda: the version of CUDA that torch was built for.
        transformer_engine: its version; None: it cannot be used, because of `fault`.
    """

    capability: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    transformer_engine: tuple[int, int] | None = None
    fault: str | None = None


def read_facts() -> DeviceFacts:
    """The facts of this process's device."""
    fault = device.transformer_engine_fault()
    return DeviceFacts(
        capability=device.compute_capability(),
        cuda=_major_minor(torch.version.cuda) if torch.version.cuda else None,
        transformer_engine=None if fault else _major_minor(version("transformer-engine")),
        fault=fault,
    )


def uses_transformer_engine(model: ModelConfig, facts: DeviceFacts) -> bool:
    """Whether the model's layers are Transformer Engine's: with "auto", wherever there is a GPU."""
    return model.layers == "transformer_engine" or (
        model.layers == "auto" and facts.capability is not None
    )


def check_layers(key: str, model: ModelConfig, facts: DeviceFacts) -> None:
    """Checks that the layers and FP8 that `model`, section `key`, asks for can run.

    Raises:
        ConfigError: for the first setting that cannot work.
    """
    _check_fp8(key, model, facts)
    if not uses_transformer_engine(model, facts):
        return
    fault, remedy = facts.fault, f"choose {key}.layers=local"
    if facts.capability is not None:
        remedy = f"install it whole (requirements/README.md) or {remedy}"
    if not fault and facts.transformer_engine < OLDEST:
        fault = f"it is {_text(facts.transformer_engine)}, older than {_text(OLDEST)}"
    if fault:
        raise ConfigError(
            f"{key}.layers={model.layers}: Transformer Engine cannot be used: {fault}; {remedy}"
        )


def check_fp8_sizes(key: str, model: ModelConfig, shape: ModelShape) -> None:
    """Checks that a model of `shape` can be computed in FP8 at all, in some layout.

    Raises:
        ConfigError: when it cannot, whatever the layout.
    """
    if reason := fp8_misfit(model, shape, Layout()):
        raise ConfigError(f"{key}.fp8={model.fp8}: {reason}")


def fp8_misfit(model: ModelConfig, shape: ModelShape, layout: Layout) -> str | None:
    """Why a model of `shape`, split by `layout`, cannot be computed in the FP8 that `model` asks
    for; None where it can, or asks for none."""
    if model.fp8 is None:
        return None
    tensor, multiple = layout.tensor, RECIPES[model.fp8].multiple
    heads, groups = shape.heads // tensor, -(-shape.groups // tensor)
    sizes = {
        "hidden size": shape.hidden,
        "width of attention": heads * shape.head_dim,
        "width of query, key and value": (heads + 2 * groups) * shape.head_dim,
        "feed-forward size": shape.ffn // tensor,
        "feed-forward size of dense layers": shape.dense_ffn // tensor,
    }
    for name, size in sizes.items():
        if size % multiple:
            return f"{name} {size} on a rank does not divide by {multiple}, as FP8 needs"
    if _gathers_blocks(model, layout) and shape.hidden % BLOCK:
        return (
            f"hidden size {shape.hidden} does not divide by {BLOCK}, as fp8=blockwise with "
            "sequence parallelism needs"
        )
    sizes = shape.stage_layers(layout.pipeline)
    for name, most in (("bf16_layers_at_start", sizes[0]), ("bf16_layers_at_end", sizes[-1])):
        if getattr(model, name) > most:
            return f"{name}={getattr(model, name)}: a pipeline stage has {most} layers"
    if model.bf16_layers_at_start + model.bf16_layers_at_end >= shape.layers:
        return (
            f"bf16_layers_at_start={model.bf16_layers_at_start} and "
            f"bf16_layers_at_end={model.bf16_layers_at_end} leave none of {shape.layers} layers"
        )
    return None


def length_multiple(model: ModelConfig, layout: Layout) -> int:
    """What the length of sequences must divide by: sequence parallelism splits it, and each rank's
    part is one size of an FP8 product."""
    shards = layout.tensor if model.sequence_parallel else 1
    if model.fp8 is None:
        return shards
    return shards * (BLOCK if _gathers_blocks(model, layout) else RECIPES[model.fp8].multiple)


def transformer_fields(model: ModelConfig, facts: DeviceFacts) -> dict:
    """TransformerConfig fields that say whose layers these are, and in which precision they
    compute."""
    fused = uses_transformer_engine(model, facts)
    fields = {"transformer_impl": "transformer_engine" if fused else "local"}
    if model.fp8:
        fields |= {
            "fp8": RECIPES[model.fp8].number_format,
            "fp8_recipe": model.fp8,
            "fp8_param": model.fp8_param,
            "first_last_layers_bf16": model.bf16_layers_at_start + model.bf16_layers_at_end > 0,
            "num_layers_at_start_in_bf16": model.bf16_layers_at_start,
            "num_layers_at_end_in_bf16": model.bf16_layers_at_end,
        }
    return fields


def fuses_norms(chunks: ModuleList) -> bool:
    """Whether a norm's weight lies in the linear layer that follows it: Transformer Engine's do."""
    return chunks[0].config.transformer_impl == "transformer_engine"


def gather_fields(model: ModelConfig) -> dict:
    """DistributedDataParallelConfig fields: in which type updated parameters are gathered."""
    return {
        "fp8_param_gather": model.fp8_param,
        # Parameters of this recipe have no buffer of their own to be gathered in.
        "reuse_grad_buf_for_mxfp8_param_ag": model.fp8_param and model.fp8 == "mxfp8",
    }


def optimizer_fields(model: ModelConfig) -> dict:
    """OptimizerConfig fields: into which type updated parameters are cast."""
    return {
        "fp8_recipe": model.fp8 if model.fp8_param else None,
        "reuse_grad_buf_for_mxfp8_param_ag": model.fp8_param and model.fp8 == "mxfp8",
    }


def share_scales(groups: "ProcessGroupCollection") -> None:
    """Has the ranks that hold the same layers, those of `groups.tp_dp_cp`, agree on the scales of
    recipe "delayed". To be called before a forward pass in FP8.

    Megatron asks parallel_state for that group and, where it is not initialised, names none.
    Transformer Engine then takes all ranks, other pipeline stages among them, whose layers are
    others and run at other times.
    """
    from megatron.core import fp8_utils  # here, as checks before a job need no Megatron

    fp8_utils.parallel_state = SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_amax_reduction_group=lambda **_: groups.tp_dp_cp,
    )


def read_weight(parameter: Parameter) -> Tensor:
    """The parameter's values in its own type, also where it is held in FP8."""
    from megatron.core import fp8_utils

    if fp8_utils.is_float8tensor(parameter):
        return fp8_utils.dequantize_fp8_tensor(parameter)
    return parameter.data


@torch.no_grad()
def write_weight(parameter: Parameter, values: Tensor) -> None:
    """Gives the parameter its first values; one held in FP8 rounds them."""
    parameter.copy_(values)
    # What the optimizer's float32 copy of an FP8 parameter starts from.
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter.get_high_precision_init_val().copy_(values)


def _check_fp8(key: str, model: ModelConfig, facts: DeviceFacts) -> None:
    if model.fp8 is None:
        for name in ("fp8_param", "bf16_layers_at_start", "bf16_layers_at_end"):
            if value := getattr(model, name):
                raise ConfigError(
                    f"{key}.{name}={str(value).lower()}: has no meaning without {key}.fp8; choose "
                    f"one of {', '.join(RECIPES)}"
                )
        return
    where = f"{key}.fp8={model.fp8}"
    if facts.capability is None:
        raise ConfigError(f"{where}: FP8 needs an NVIDIA GPU, none is here")
    if reason := _refusal(RECIPES[model.fp8], facts):
        others = [name for name, recipe in RECIPES.items() if not _refusal(recipe, facts)]
        remedy = f"choose one of {', '.join(others)}" if others else "no FP8 recipe runs here"
        raise ConfigError(f"{where}: {reason}; {remedy}")
    if not uses_transformer_engine(model, facts):
        raise ConfigError(
            f"{where}: only the layers of Transformer Engine compute in FP8, not "
            f"{key}.layers={model.layers}; choose auto"
        )
    if model.dtype != "bfloat16":
        raise ConfigError(f"{where}: needs {key}.dtype=bfloat16, not {model.dtype}")
    if model.fp8 == "delayed":
        if model.fp8_param:
            raise ConfigError(
                f"{key}.fp8_param=true: fp8=delayed takes its scales from earlier steps, and none "
                "precedes the reading of the weights; choose another recipe"
            )
        for name in ("bf16_layers_at_start", "bf16_layers_at_end"):
            if value := getattr(model, name):
                raise ConfigError(
                    f"{key}.{name}={value}: fp8=delayed scales all layers together; choose "
                    "another recipe"
                )


def _refusal(recipe: Recipe, facts: DeviceFacts) -> str | None:
    if not recipe.oldest <= facts.capability < recipe.newest:
        newest = f" and below {_text(recipe.newest)}" if recipe.newest < (99, 0) else ""
        return (
            f"needs compute capability {_text(recipe.oldest)} or above{newest}, this GPU has "
            f"{_text(facts.capability)}"
        )
    if facts.cuda < recipe.cuda:
        return f"needs CUDA {_text(recipe.cuda)}, torch was built for {_text(facts.cuda)}"
    return None


def _gathers_blocks(model: ModelConfig, layout: Layout) -> bool:
    # Transformer Engine gathers sequence shards in FP8, and of this recipe only whole blocks.
    return model.fp8 == "blockwise" and model.sequence_parallel and layout.tensor > 1


def _major_minor(text: str) -> tuple[int, int]:
    found = Version(text)
    return found.major, found.minor


def _text(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
