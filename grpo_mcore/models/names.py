"""A parameter's name over the whole model: layers numbered over all stages, experts over all ranks.

"decoder.layers.3.mlp.experts.5.linear_fc1.weight", whichever chunk of which stage holds layer 3,
and whether the expert is a module of its own or an entry of Transformer Engine's grouped layer.
"""

import re

from torch.nn import ModuleList, Parameter

from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.groups import Role

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12]\.weight)(\d+)$")


def named_weights(chunks: ModuleList, shape: ModelShape, role: Role) -> dict[str, Parameter]:
    """This rank's parameters by their names over the whole model."""
    first_expert = role.expert_rank * (shape.experts // role.layout.expert)
    return {
        _whole_name(name, chunk.decoder.layers, first_expert): parameter
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }


def _whole_name(name: str, layers: ModuleList, first_expert: int) -> str:
    # Megatron counts layers from 1.
    name = _LAYER.sub(lambda m: f"decoder.layers.{layers[int(m[1])].layer_number - 1}.", name)
    name = _EXPERT.sub(lambda m: f".experts.{int(m[1]) + first_expert}.", name)
    return _GROUPED_EXPERT.sub(lambda m: f".experts.{int(m[2]) + first_expert}.{m[1]}", name)
