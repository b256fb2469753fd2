"""How many parameters one rank holds."""

from dataclasses import dataclass
from functools import cache

from grpo_mcore.config import LoraConfig
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout


@dataclass(frozen=True)
class Held:
    """Numbers of parameters.

    Attributes:
        dense: of all but experts; data parallel ranks each hold them.
        experts: of experts, which expert parallel ranks share out.
        embedding: of the embedding on the first stage (and of the output layer on the last).
        output: of the output layer where the loss is computed; 0 on other stages.
        largest: of the largest single one.
    """

    dense: int
    experts: int
    embedding: int
    output: int
    largest: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


@cache
def held(shape: ModelShape, layout: Layout, stage: int, virtual_pipeline: int = 1) -> Held:
    """Those of a rank of pipeline stage `stage`."""
    tensor = layout.tensor
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.groups) // tensor
    attention += 2 * shape.hidden  # two norms
    if shape.qkv_bias:
        attention += shape.head_dim * (shape.heads + 2 * shape.groups) // tensor
    if shape.qk_norm:
        attention += 2 * shape.head_dim
    vocabulary = shape.padded_vocab(tensor) // tensor * shape.hidden
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    dense, experts, largest = 0, 0, shape.hidden * 2 * (shape.dense_ffn or shape.ffn) // tensor
    for layer in shape.layers_of_stages(layout.pipeline, virtual_pipeline)[stage]:
        dense += attention
        if shape.has_experts(layer):
            dense += shape.experts * shape.hidden  # the router
            experts += shape.experts // layout.expert * 3 * shape.hidden * shape.ffn // tensor
        else:
            dense += 3 * shape.hidden * (shape.dense_ffn or shape.ffn) // tensor
    # A model of several stages holds tied weights at both ends.
    ends = is_first + (is_last and (not shape.tied or not is_first))
    if ends:
        dense, largest = dense + ends * vocabulary, max(largest, vocabulary)
    if is_last:
        dense += shape.hidden  # the last norm
    return Held(dense, experts, ends * vocabulary, vocabulary * is_last, largest)


def adapters(shape: ModelShape, lora: LoraConfig, layout: Layout, stage: int) -> int:
    """Parameters of a rank's adapters (Hu et al., arXiv:2106.09685: r (inputs + outputs) for each
    matrix), of which the side that tensor parallel ranks share is a share."""
    heads, groups = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    sizes = {  # (whole on every rank, shared out)
        "q_proj": (shape.hidden, heads),
        "k_proj": (shape.hidden, groups),
        "v_proj": (shape.hidden, groups),
        "o_proj": (shape.hidden, heads),
        "gate_proj": (shape.hidden, shape.ffn),
        "up_proj": (shape.hidden, shape.ffn),
        "down_proj": (shape.hidden, shape.ffn),
    }
    each = sum(lora.r * (sizes[n][0] + sizes[n][1] // layout.tensor) for n in lora.target_modules)
    return each * shape.stage_layers(layout.pipeline)[stage]
