"""What a Hugging Face config.json says of a decoder, read before any model loads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Sizes and variants of a decoder-only transformer.

    Attributes:
        groups: key-value heads (query groups).
        positions: longest sequence, prompt and completion together.
        rope_scaling: Llama 3's frequency scaling factor; None for plain rotary embeddings.
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
    rope_scaling: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Vocabulary rounded up so that each tensor parallel rank holds the same number of rows."""
        return -(-self.vocab // tensor_parallel) * tensor_parallel

    @property
    def parameters(self) -> int:
        """Number of weights (biases and norms, a thousandth of it, left out)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.groups)
        layer = attention + 3 * self.hidden * self.ffn
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2)
