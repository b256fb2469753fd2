"""Rotary position embeddings: the frequencies that Megatron-Core has no settings for."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_mcore.errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts longer than those of pre-training.

    Attributes:
        kind: "linear" (all of them) or "llama3" (the low ones).
        factor: what a stretched frequency is divided by.
        low, high: with `original` positions, wavelengths over original / low are stretched, those
            under original / high are left, and between them the two are mixed.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def read_rope(hf: dict, where: str) -> tuple[float, RopeScaling | None]:
    """(base, scaling) from a configuration as transformers completes it.

    Raises:
        ConfigError: for a kind of scaling that is not supported; `where` names the setting.
    """
    rope = hf["rope_parameters"]
    base, kind = rope["rope_theta"], rope["rope_type"]
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling(kind, rope["factor"])
    if kind != "llama3":
        raise ConfigError(
            f"{where}: rope_type={kind} is not supported; only default, linear and llama3"
        )
    return base, RopeScaling(
        kind,
        rope["factor"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """[head_dim / 2] radians a position, float32.

    base^(-2i / head_dim) (Su et al. 2021, RoFormer, section 3.2.2), scaled as Llama 3.1's release
    does or linearly (Chen et al. 2023, Position Interpolation).
    """
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched
    wavelength = 2 * math.pi / plain
    mix = (scaling.original / wavelength - scaling.low) / (scaling.high - scaling.low)
    mix = mix.clamp(0, 1)
    return (1 - mix) * stretched + mix * plain
