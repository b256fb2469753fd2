"""What tensors a model of a given shape consists of, in Megatron and in Hugging Face files; known,
and checked, before any is read."""

import re

import torch
from torch import Tensor

from grpo_mcore.errors import ConfigError, FilesError
from grpo_mcore.models.families import FAMILIES
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.rules import Rule
from grpo_mcore.models.shape import ModelShape

_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def stored_rules(shape: ModelShape) -> dict[str, Rule]:
    """The rules by the names parameters have in a checkpoint: norms where Transformer Engine keeps
    them, and a tied output layer not at all."""
    rules = FAMILIES[shape.family].rules(shape, fused_norms=True)
    left_out = {"output_layer.weight"} if shape.tied else set()
    return {name: rule for name, rule in rules.items() if name not in left_out}


def whole_size(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The size, over all ranks and without padding, of the Megatron parameter `name`."""
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    expert = _EXPERT.search(name)
    ffn = shape.dense_ffn if shape.experts and not expert else shape.ffn
    sizes = {
        "word_embeddings.weight": (shape.vocab, shape.hidden),
        "output_layer.weight": (shape.vocab, shape.hidden),
        "linear_qkv.weight": (queries + 2 * keys, shape.hidden),
        "linear_qkv.bias": (queries + 2 * keys,),
        "q_layernorm.weight": (shape.head_dim,),
        "k_layernorm.weight": (shape.head_dim,),
        "linear_proj.weight": (shape.hidden, queries),
        "router.weight": (shape.experts, shape.hidden),
        "linear_fc1.weight": (2 * ffn, shape.hidden),
        "linear_fc2.weight": (shape.hidden, ffn),
    }
    return sizes.get(".".join(name.split(".")[-2:]), (shape.hidden,))  # the others are norms


def hf_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The size of every Hugging Face tensor, by name."""
    return {
        name: tuple(tensor.shape)
        for parameter, rule in stored_rules(shape).items()
        for name, tensor in rule.merge([_meta(whole_size(parameter, shape))]).items()
    }


def check_tensors(reader: HFReader, shape: ModelShape) -> list[str]:
    """Compares what the headers say with what the model needs.

    Returns:
        The tensors that are there and not needed: precomputed rotary frequencies, and a tied
        model's output layer that equals its embedding.

    Raises:
        FilesError: naming the first tensor that is missing, unexpected, of another shape, or
            quantised.
    """
    where = reader.directory
    sizes = hf_sizes(shape)
    for name, size in sizes.items():
        if name not in reader.stored:
            raise FilesError(f"{where}: tensor {name} is missing")
        held = reader.stored[name]
        if held.shape != size:
            raise FilesError(
                f"{where}: tensor {name} is {list(held.shape)}; by config.json it is {list(size)}"
            )
        if not held.dtype.is_floating_point or held.dtype.itemsize < 2:
            raise FilesError(
                f"{where}: tensor {name} is {held.dtype}: a quantised model; give a plain one"
            )
    spare = [name for name in reader.names if name not in sizes]
    for name in spare:
        if not _HARMLESS.search(name) and not _is_tied_copy(reader, shape, name):
            raise FilesError(f"{where}: tensor {name} is none of a {shape.family} model's")
    return spare


def check_weights(key: str, path: str, shape: ModelShape) -> None:
    """Checks, by their headers, that the safetensors in directory `path`, the value of setting
    `key`, are whole and hold a model of `shape`."""
    try:
        check_tensors(HFReader(path), shape)
    except FilesError as error:  # which begins with the path
        raise ConfigError(f"{key}={error}") from error


def _is_tied_copy(reader: HFReader, shape: ModelShape, name: str) -> bool:
    return (
        shape.tied
        and name == "lm_head.weight"
        and torch.equal(reader.read(name), reader.read("model.embed_tokens.weight"))
    )


def _meta(size: tuple[int, ...]) -> Tensor:
    return torch.empty(size, device="meta")
