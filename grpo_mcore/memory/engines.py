"""What a vLLM engine holds, on each of its devices, and what giving it weights takes."""

from grpo_mcore.memory.activations import ELEMENT
from grpo_mcore.memory.parameters import held
from grpo_mcore.models.shape import ModelShape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.rollout.bucket import BUFFERS


def engine_weights(
    shape: ModelShape, dtype: str, tensor: int, quantization: str | None, on_cpu: bool
) -> int:
    """Bytes of the weights of one of `tensor` workers; in FP8 all but the vocabulary's. On a CPU
    vLLM packs every matrix anew, and keeps the embedding and the output layer as they were too."""
    own, element = held(shape, Layout(tensor), 0), ELEMENT[dtype]
    if quantization == "fp8":
        return own.total - own.embedding + own.embedding * element
    return (own.total + own.embedding * on_cpu) * element


def cache_of_sequence(shape: ModelShape, dtype: str, tensor: int, length: int) -> int:
    """Bytes of the keys and values of `length` tokens on one of `tensor` workers, each of which has
    at least one key-value head."""
    heads = max(1, shape.groups // tensor)
    return 2 * shape.layers * heads * shape.head_dim * ELEMENT[dtype] * length


def bucket_bytes(shape: ModelShape, dtype: str, bucket_megabytes: int) -> int:
    """Bytes of the buffers through which the weights go: as large as a bucket or the largest
    tensor, and no larger than the model."""
    element = ELEMENT[dtype]
    largest = element * max(shape.vocab, shape.ffn) * shape.hidden
    model = element * held(shape, Layout(), 0).total
    return BUFFERS * min(max(bucket_megabytes << 20, largest), model)
