"""Weight rules: sharding and merging are inverse, and shards are what Megatron's layers hold."""

import pytest
import torch

from grpo_mcore.models.families import FAMILIES, read_shape
from grpo_mcore.models.hf_files import HFReader
from grpo_mcore.models.rules import QKV, Columns, GateUp, Replicated, VocabRows
from tests.conftest import FAMILY_MODELS

VOCAB, HIDDEN, FFN, GROUPS, PER_GROUP, HEAD = 10, 6, 8, 4, 3, 2
TENSORS = {
    name: torch.randn(*size, generator=torch.Generator().manual_seed(number))
    for number, (name, size) in enumerate(
        {
            "norm": (HIDDEN,),
            "embed": (VOCAB, HIDDEN),
            "o": (HIDDEN, FFN),
            "gate": (FFN, HIDDEN),
            "up": (FFN, HIDDEN),
            "q": (GROUPS * PER_GROUP * HEAD, HIDDEN),
            "k": (GROUPS * HEAD, HIDDEN),
            "v": (GROUPS * HEAD, HIDDEN),
            "q_bias": (GROUPS * PER_GROUP * HEAD,),
            "k_bias": (GROUPS * HEAD,),
            "v_bias": (GROUPS * HEAD,),
        }.items()
    )
}
RULES = {
    "replicated": Replicated("norm"),
    "columns": Columns("o"),
    "vocabulary": VocabRows("embed", VOCAB),
    "gate and up": GateUp("gate", "up"),
    "qkv": QKV("q", "k", "v", GROUPS, PER_GROUP, HEAD),
    "qkv bias": QKV("q_bias", "k_bias", "v_bias", GROUPS, PER_GROUP, HEAD),
}
MADE_OF = {
    "replicated": {"norm"},
    "columns": {"o"},
    "vocabulary": {"embed"},
    "gate and up": {"gate", "up"},
    "qkv": {"q", "k", "v"},
    "qkv bias": {"q_bias", "k_bias", "v_bias"},
}


class Held:
    """A reader of TENSORS that remembers how much was read."""

    def __init__(self, tensors=TENSORS):
        self.tensors, self.elements = tensors, 0

    def shape(self, name):
        return list(self.tensors[name].shape)

    def read(self, name, dim=0, start=0, stop=None):
        tensor = self.tensors[name]
        stop = tensor.shape[dim] if stop is None else stop
        part = tensor.narrow(dim, start, stop - start)
        self.elements += part.numel()
        return part


def shards(rule, size):
    return [rule.shard(Held(), rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_merge_undoes_shard(name, size):
    merged = RULES[name].merge(shards(RULES[name], size))
    for tensor, values in merged.items():
        assert torch.equal(values, TENSORS[tensor])
    assert merged.keys() == MADE_OF[name]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", RULES)
def test_places_of_all_shards_are_the_whole_tensors(name, size):
    whole = {tensor: torch.full_like(TENSORS[tensor], torch.nan) for tensor in MADE_OF[name]}
    for rank, shard in enumerate(shards(RULES[name], size)):
        row = 0
        for place in RULES[name].places(whole, rank, size):
            place.copy_(shard[row : row + len(place)])
            row += len(place)
    assert all(torch.equal(values, TENSORS[tensor]) for tensor, values in whole.items())


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"replicated"}))
def test_shards_in_the_wrong_order_merge_to_something_else(name):
    merged = RULES[name].merge(shards(RULES[name], 2)[::-1])
    assert not any(torch.equal(values, TENSORS[tensor]) for tensor, values in merged.items())


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"replicated"}))
def test_a_rank_reads_only_its_share(name):
    whole, half = Held(), Held()
    RULES[name].shard(whole, 0, 1)
    RULES[name].shard(half, 1, 2)
    assert half.elements == whole.elements / 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_qkv_is_laid_out_as_megatron_splits_it(size):
    """Megatron's attention views a shard as [group, (queries + 2) * head, ...] and cuts each
    group's part into its queries, its key and its value."""
    query, key, value = (TENSORS[name].split(HEAD) for name in "qkv")  # by head
    for rank, shard in enumerate(shards(RULES["qkv"], size)):
        held = range(rank * GROUPS // size, (rank + 1) * GROUPS // size)
        expected = []
        for group in held:
            expected += query[group * PER_GROUP : (group + 1) * PER_GROUP]
            expected += [key[group], value[group]]
        assert torch.equal(shard, torch.cat(expected))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_and_up_are_stacked_within_a_shard(size):
    """Megatron's gated unit cuts each shard's output into two halves."""
    for rank, shard in enumerate(shards(RULES["gate and up"], size)):
        gate, up = shard.chunk(2)
        assert torch.equal(gate, TENSORS["gate"].chunk(size)[rank])
        assert torch.equal(up, TENSORS["up"].chunk(size)[rank])


@pytest.mark.parametrize("size, rows", [(1, 10), (2, 5), (4, 3), (8, 2)])
def test_vocabulary_is_padded_with_zeros_at_its_end(size, rows):
    parts = shards(RULES["vocabulary"], size)
    assert {part.shape for part in parts} == {(rows, HIDDEN)}
    whole = torch.cat(parts)
    assert torch.equal(whole[:VOCAB], TENSORS["embed"])
    assert whole[VOCAB:].count_nonzero() == 0


@pytest.mark.parametrize("model", FAMILY_MODELS)
@pytest.mark.parametrize("fused_norms", [False, True], ids=["local", "transformer engine"])
def test_a_familys_rules_account_for_every_tensor(tiny_models, model, fused_norms):
    reader = HFReader(tiny_models / model, torch.float32)
    shape = read_shape("model.path", str(tiny_models / model))
    merged, named = {}, set()
    for rule in FAMILIES[shape.family].rules(shape, fused_norms).values():
        tensors = rule.merge([rule.shard(reader, rank, 2) for rank in range(2)])
        assert tensors.keys() == set(rule.names)
        merged |= tensors
        named |= set(rule.names)
    assert named == reader.stored.keys()
    assert all(torch.equal(merged[name], reader.read(name)) for name in named)


def test_every_family_has_a_model_to_be_tested_with(tiny_models):
    tested = {read_shape("path", str(tiny_models / model)).family for model in FAMILY_MODELS}
    assert tested == FAMILIES.keys()
