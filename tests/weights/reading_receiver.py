"""Workers that read their weights back, as their kernels read them."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter

from grpo_mcore.rollout.receiver import WeightReceiver

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ReadingReceiver(WeightReceiver):
    def receive_bucket(self, number: int, place: int) -> None:
        super().receive_bucket(number, place)
        if self.parallel_config.tensor_parallel_size == 1:
            # No other worker reads it, and nothing that was loaded may still lie in it.
            self.buffers[place].fill_(255)

    def compare(self, directory: str) -> tuple[list[str], list[str]]:
        """Compares this worker's weights with a model in Hugging Face's files, bit for bit.

        Returns:
            The tensors that differ, and those that were compared.
        """
        tensors = {}
        for file in Path(directory).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        model = self.model_runner.model
        differing, compared = [], []
        for name, found, expected in self._pairs(model, tensors):
            if found.shape != expected.shape or not torch.equal(found, expected):
                differing.append(name)
            compared.append(name)
        return sorted(differing), sorted(compared)

    def _pairs(self, model, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, what the layer has of the tensor, what of the tensor belongs to this worker."""
        from vllm.model_executor.layers.linear import (
            LinearBase,
            MergedColumnParallelLinear,
            QKVParallelLinear,
            RowParallelLinear,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        size = self.parallel_config.tensor_parallel_size
        for path, layer in model.named_modules():
            parent = path.rpartition(".")[0]
            if isinstance(layer, QKVParallelLinear):
                names = [f"{parent}.{kind}_proj" for kind in "qkv"]
                heads = [layer.num_heads, layer.num_kv_heads, layer.num_kv_heads]
                rows = [count * layer.head_size for count in heads]
                copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
                yield from self._row_parts(layer, names, rows, copies, tensors)
            elif isinstance(layer, MergedColumnParallelLinear):
                names = [f"{parent}.gate_proj", f"{parent}.up_proj"]
                rows = [n // size for n in layer.output_sizes]
                yield from self._row_parts(layer, names, rows, [1, 1], tensors)
            elif isinstance(layer, RowParallelLinear):
                name = f"{path}.weight"
                yield name, _matrix(layer), tensors[name].chunk(size, 1)[self.rank]
            elif isinstance(layer, LinearBase):  # the router
                yield f"{path}.weight", _matrix(layer), tensors[f"{path}.weight"]
            elif isinstance(layer, VocabParallelEmbedding):
                name = f"{path}.weight"
                if isinstance(layer, ParallelLMHead) and name not in tensors:
                    name = "model.embed_tokens.weight"
                count, first = (
                    layer.shard_indices.num_org_elements,
                    layer.shard_indices.org_vocab_start_index,
                )
                expected = tensors[name][first : first + count]
                yield name, layer.weight[:count], expected
                if layer is model.lm_head:
                    yield name, _matrix(layer)[:count], expected
            elif type(layer).__name__ == "RMSNorm":
                yield f"{path}.weight", layer.weight, tensors[f"{path}.weight"]
            elif hasattr(layer, "w13_weight"):
                yield from self._experts(layer, path.partition(".experts")[0], tensors)

    def _row_parts(self, layer, names, rows, copies, tensors):
        parts = _matrix(layer).split(rows)
        for name, found, count, shared_by in zip(names, parts, rows, copies, strict=True):
            first = self.rank // shared_by * count
            expected = tensors[f"{name}.weight"]
            yield f"{name}.weight", found, expected[first : first + count]
        if layer.bias is not None:
            biases = layer.bias.split(rows)
            for name, found, count, shared_by in zip(names, biases, rows, copies, strict=True):
                first = self.rank // shared_by * count
                yield f"{name}.bias", found, tensors[f"{name}.bias"][first : first + count]

    def _experts(self, layer, parent: str, tensors: dict[str, Tensor]):
        """The kernel reads packed experts, so what is expected is packed too, all of it at once."""
        size = self.parallel_config.tensor_parallel_size
        kinds = ("w1", "w3", "w2") if "block_sparse_moe" in parent else PROJECTIONS
        names = [
            [f"{parent}.experts.{expert}.{kind}.weight" for kind in kinds]
            for expert in range(len(layer.w13_weight))
        ]
        shards = [
            [tensors[n].chunk(size, int(n == down))[self.rank] for n in (gate, up, down)]
            for gate, up, down in names
        ]
        packed = torch.nn.Module()
        packed.w13_weight = Parameter(torch.stack([torch.cat(s[:2]) for s in shards]), False)
        packed.w2_weight = Parameter(torch.stack([s[2] for s in shards]), False)
        kernel = layer.quant_method.moe_kernel.fused_experts
        kernel.process_weights_after_loading(packed)
        for gate, up, down in names:
            yield gate, layer.w13_weight, packed.w13_weight
            yield up, layer.w13_weight, packed.w13_weight
            yield down, layer.w2_weight, packed.w2_weight


def _matrix(layer) -> Tensor:
    """What the layer multiplies by [outputs, inputs]: its answer to each unit vector."""
    known = vars(layer)
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    inputs = next(known[size] for size in sizes if size in known)
    units = torch.eye(inputs)
    return layer.quant_method.apply(layer, units, None).T.contiguous()
