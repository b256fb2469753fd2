"""What a Hugging Face config.json says of a decoder, read before any model loads."""

from dataclasses import dataclass

from grpo_mcore.models.rope import RopeScaling


@dataclass(frozen=True)
class ModelShape:
    """Sizes and variants of a decoder-only transformer.

    Attributes:
        ffn: width of the feed-forward layers; of one expert in a mixture of experts.
        groups: key-value heads (query groups).
        positions: longest sequence, prompt and completion together.
        window: how many positions attention reaches, itself included; None: all before it.
        experts: in each mixture-of-experts layer; 0: all layers are dense.
        experts_per_token: how many of them a token is sent to.
        weigh_all_experts: their weights are probabilities among all experts, and not renormalised
            over those chosen.
        dense_layers: layers of a mixture-of-experts model that have no experts, and `dense_ffn`,
            their width.
    """

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    positions: int
    norm_eps: float
    rope_base: float
    tied: bool
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    weigh_all_experts: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_ffn: int = 0

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rounded up so that each tensor parallel rank holds the same number of rows."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    def stage_layers(self, stages: int) -> list[int]:
        """Layers of each pipeline stage. Megatron wants all stages equal but the first and the
        last; where layers do not divide, those, which also hold the embedding and the output
        layer, get fewer if that leaves them any, else more."""
        if self.layers % stages == 0:
            return [self.layers // stages] * stages
        middle = -(-self.layers // stages)
        if self.layers - middle * (stages - 2) < 2:
            middle -= 1
        outer = self.layers - middle * (stages - 2)
        return [-(-outer // 2), *[middle] * (stages - 2), outer // 2]

    def layers_of_stages(self, stages: int, parts: int = 1) -> list[list[int]]:
        """The numbers of the layers, from 0, that each pipeline stage holds, in `parts` parts of a
        virtual pipeline."""
        sizes = [size // parts for size in self.stage_layers(stages)] * parts
        held: list[list[int]] = [[] for _ in range(stages)]
        first = 0
        for number, size in enumerate(sizes):
            held[number % stages] += range(first, first + size)
            first += size
        return held

    @property
    def parameters(self) -> int:
        """Number of weights (biases and norms, a thousandth of it, left out)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.groups)
        dense_layers = len(self.dense_layers) if self.experts else self.layers
        dense = dense_layers * 3 * self.hidden * (self.dense_ffn if self.experts else self.ffn)
        routers = (self.layers - dense_layers) * self.experts * self.hidden
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * attention + dense + routers + embeddings + self.expert_parameters

    @property
    def expert_parameters(self) -> int:
        """Those of `parameters` that expert parallelism spreads over ranks."""
        if not self.experts:
            return 0
        layers = self.layers - len(self.dense_layers)
        return layers * self.experts * 3 * self.hidden * self.ffn

    def has_experts(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers
