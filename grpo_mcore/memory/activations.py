"""What a forward and backward pass holds besides the model's states.

Korthikanti et al. (arXiv:2205.05198) count, for a layer of GPT, what its backward pass needs of the
forward pass; here it is counted likewise for RMSNorm, grouped queries and SwiGLU. For each token,
with h the hidden size, q and k the widths of all queries and of all keys, f that of the
feed-forward layer, n heads, s the sequence's length and e the bytes of an element:

    two norms     2 (8 + e) h    Megatron's own, which compute in float32: their input, that
                                 normalised, and what they give
                  4 e h          Transformer Engine's: their input and what they give
    attention     4 e q + 4 n s  Megatron's own: queries, keys and values repeated for every query,
                                 result, and probabilities in float32
                  + e n s        and in bfloat16, where e is 2
                  e (3 q + 3 k)  Transformer Engine's, or recomputed: queries and keys with their
                                 positions, what these and the values were cut from, result
    feed-forward  5 e f          gate and up, SiLU of the one, a copy of the other, product

Tensor parallel ranks share out all but the norms, which sequence parallelism shares out too. With
full recomputation a layer keeps e h, its input, and is held whole only while it is recomputed.
"""

from dataclasses import dataclass

from grpo_mcore.config import ModelConfig
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout

ELEMENT = {"float32": 4, "bfloat16": 2}
"""Bytes of an element, by `model.dtype`."""
CHUNK = 2048
"""Positions whose float32 logits exist at once (`models.log_probs`)."""
CHUNK_COPIES_FORWARD, CHUNK_COPIES_BACKWARD = 3, 4
"""float32 tensors of a chunk's logits at once."""


@dataclass(frozen=True)
class Passes:
    """Makes estimates for micro-batches of one model on one rank.

    Attributes:
        rows, length: of a micro-batch, padding included.
        fused: whether the layers are Transformer Engine's.
    """

    shape: ModelShape
    model: ModelConfig
    layout: Layout
    rows: int
    length: int
    fused: bool

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def element(self) -> int:
        return ELEMENT[self.model.dtype]

    @property
    def boundary(self) -> int:
        """Bytes of what goes from one layer to the next."""
        return self.tokens * self.element * self.shape.hidden // self._sequence_shards

    @property
    def _sequence_shards(self) -> int:
        return self.layout.tensor if self.model.sequence_parallel else 1

    def scores(self) -> int:
        """Bytes of the attention probabilities of a layer, in float32."""
        return self.tokens * self.length * self.shape.heads // self.layout.tensor * 4

    def layer(self, number: int, recomputed: bool = False) -> int:
        """Bytes that layer `number` keeps for its backward pass, without full recomputation.

        Args:
            recomputed: its attention is.
        """
        shape, e = self.shape, self.element
        q, k = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        of_norm = 2 * e if self.fused else 8 + e
        norms = 2 * of_norm * shape.hidden
        if shape.qk_norm:
            norms += of_norm * (q + k) // self.layout.tensor * self._sequence_shards
        if self.fused or recomputed:
            attention, scores = e * 3 * (q + k), 0
        else:
            attention, scores = e * 4 * q, self.scores()
            scores += scores * e // 4 if e < 4 else 0
        if shape.has_experts(number):
            each = e * (2 * shape.hidden + 5 * shape.ffn // self.layout.tensor)
            feed_forward = shape.experts_per_token * each * self.layout.tensor
        else:
            feed_forward = 5 * e * (shape.dense_ffn or shape.ffn)
        shared = (attention + feed_forward) // self.layout.tensor
        return self.tokens * (norms // self._sequence_shards + shared) + scores

    def kept(self, stage: int) -> int:
        """Bytes that the layers of pipeline stage `stage` keep of the micro-batches under way: of
        one, or of as many as stages follow, and itself (the schedule 1F1B), and in a virtual
        pipeline of p stages and v parts (p - 1) / (p v) times as many more (Narayanan et al.,
        arXiv:2104.04473)."""
        shape, model, stages = self.shape, self.model, self.layout.pipeline
        layers = shape.layers_of_stages(stages, model.virtual_pipeline)[stage]
        if model.recompute == "full":
            each = len(layers) * self.boundary
        else:
            each = sum(self.layer(n, model.recompute == "selective") for n in layers)
        under_way = stages - stage
        if model.virtual_pipeline > 1:
            under_way = stages * (1 + (stages - 1) / (stages * model.virtual_pipeline))
        kept = int(each * under_way)
        if stage == stages - 1:
            kept += self._final_norm()
        return kept

    def _final_norm(self) -> int:
        of_norm = 2 * self.element if self.fused else 8 + self.element
        return self.tokens * of_norm * self.shape.hidden // self._sequence_shards

    def at_work(self, stage: int) -> int:
        """Bytes that the backward pass of one layer takes besides what was kept: the layer itself
        where it is recomputed, its scores and their gradients, gradients of the widest product."""
        shape, model = self.shape, self.model
        layers = shape.layers_of_stages(self.layout.pipeline, model.virtual_pipeline)[stage]
        widest = max(shape.ffn * max(1, shape.experts_per_token), shape.dense_ffn)
        gradients = self.tokens * self.element * 4 * widest // self.layout.tensor
        work = max(gradients, 0 if self.fused else 2 * self.scores())
        if model.recompute == "full":
            return max(map(self.layer, layers)) + work
        if model.recompute == "selective" and not self.fused:
            return work + max(self.layer(n) - self.layer(n, True) for n in layers)
        return work

    def forward(self) -> int:
        """Bytes that one layer takes in a pass without gradient."""
        shape, e = self.shape, self.element
        q, k = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        widest = max(shape.ffn * max(1, shape.experts_per_token), shape.dense_ffn)
        attention = e * 3 * (q + k)
        scores = 0 if self.fused else 3 * self.scores()
        shared = max(
            attention * self.tokens // self.layout.tensor + scores,
            self.tokens * e * 5 * widest // self.layout.tensor,
        )
        return 2 * self.boundary + shared

    def logits(self) -> int:
        """Bytes of a micro-batch's logits over this rank's part of the vocabulary."""
        width = self.shape.padded_vocab(self.layout.tensor) // self.layout.tensor
        return self.tokens * width * self.element

    def head(self, backward: bool, output_parameters: int) -> int:
        """Bytes that the output layer and the log-probabilities take on the last stage: the logits,
        another copy of them (their gradient, in the backward pass), and the largest of: float32
        copies of a chunk of them, the gradient of the output layer's weights.

        Args:
            output_parameters: of the output layer.
        """
        chunk = min(CHUNK, self.tokens) * self.logits() // self.tokens // self.element * 4
        if not backward:
            return self.logits() + max(self.logits(), CHUNK_COPIES_FORWARD * chunk)
        return 2 * self.logits() + max(
            CHUNK_COPIES_BACKWARD * chunk, output_parameters * self.element
        )
