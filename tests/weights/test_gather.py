"""Shards travel in pieces of some rows, and merging adapters takes little memory."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_mcore.config import LoraConfig
from grpo_mcore.models import lora as lora_module
from grpo_mcore.models.lora import Adapters
from grpo_mcore.models.rules import QKV, Rows
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.weights import gather as gather_module
from grpo_mcore.weights.gather import Gather, _cut
from grpo_mcore.weights.plan import Bucket, Entry, Plan


def test_pieces_have_room_or_one_row():
    entries = tuple(Entry((name,), size) for name, size in (("a", (2, 9)), ("b", (5, 1))))
    pieces = [[(e.names[0], first, last) for e, first, last in p] for p in _cut(entries, numel=4)]
    assert pieces == [[("a", 0, 1)], [("a", 1, 2)], [("b", 0, 4)], [("b", 4, 5)]]


def make_gather(shards: dict[str, torch.Tensor], rank: int = 0) -> tuple[Gather, Bucket]:
    """Of one of two tensor parallel ranks that hold `shards`, and the bucket of all."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    bucket = Bucket(0, 1, tuple(Entry((n,), tuple(s.shape)) for n, s in shards.items()))
    gather = Gather.__new__(Gather)
    gather.plan = Plan((bucket,), {name: Rows(name) for name in shards}, Layout(tensor=2))
    gather.role = SimpleNamespace(
        rank=rank,
        layout=gather.plan.layout,
        pipeline_rank=0,
        expert_rank=0,
        groups=SimpleNamespace(tp=group, pp=None),
    )
    gather.parameters, gather.piece, gather.pick = shards, 48, lambda shard: shard
    return gather, bucket


@pytest.fixture
def collectives(monkeypatch) -> list[str]:
    """Names of those that were called; both ranks of the stand-in for a group send the same."""
    called = []

    def all_gather(gathered, flat, group):
        called.append("all_gather")
        gathered.view(2, -1).copy_(flat)

    monkeypatch.setattr(gather_module.dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(gather_module.dist, "get_process_group_ranks", lambda group: [0, 1])
    return called


def test_a_shard_is_made_once_for_all_its_pieces(collectives):
    shards = {name: torch.randn(rows, 3) for name, rows in (("a", 40), ("b", 2), ("c", 1))}
    gather, bucket = make_gather(shards)
    made = []
    gather.pick = lambda shard: made.append(len(shard)) or shard
    tensors = {name: torch.empty(2 * len(shard), 3) for name, shard in shards.items()}
    gather.write(bucket, tensors, [(0,)])
    assert made == [40, 2, 1]
    for name, shard in shards.items():
        assert torch.equal(tensors[name], torch.cat([shard, shard]))


def test_ranks_that_share_memory_exchange_nothing(collectives, monkeypatch):
    by_rank = [{name: torch.randn(4, 3) for name in "ab"} for _ in range(2)]
    tensors = {name: torch.zeros(8, 3) for name in "ab"}
    rows_at_barrier = []

    def barrier(group):
        rows_at_barrier.append([int(whole.any(dim=1).sum()) for whole in tensors.values()])

    monkeypatch.setattr(gather_module.dist, "barrier", barrier)
    for rank, shards in enumerate(by_rank):
        gather, bucket = make_gather(shards, rank)
        gather.write(bucket, tensors, [(0, 1)])
    assert not collectives
    assert rows_at_barrier == [[4, 4], [8, 8]]
    for name, whole in tensors.items():
        assert torch.equal(whole, torch.cat([shards[name] for shards in by_rank]))


class Widest(TorchDispatchMode):
    """Elements of the largest tensor in 32 bits that is made."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numel = max(self.numel, result.numel())
        return result


def test_adapters_are_merged_a_few_rows_at_once(monkeypatch):
    rule = QKV("q_proj.weight", "k_proj.weight", "v_proj.weight", 2, 3, 4)
    weight, values = torch.randn(40, 16).bfloat16(), {}
    for name, rows in (("q", 24), ("v", 8)):
        values[f"base_model.model.{name}_proj.lora_A.weight"] = torch.randn(2, 16)
        values[f"base_model.model.{name}_proj.lora_B.weight"] = torch.randn(rows, 2)
    role = SimpleNamespace(
        groups=SimpleNamespace(tp=None), tensor_rank=0, layout=SimpleNamespace(tensor=1)
    )
    adapters = Adapters(
        SimpleNamespace(weight=weight),
        rule,
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
        SimpleNamespace(shape=lambda name: values[name].shape, read=lambda n, *_: values[n]),
        role,
        SimpleNamespace(sequence_parallel=False, params_dtype=torch.bfloat16),
    )
    expected = {}
    for name, matrix in rule.merge([weight]).items():
        pair = [values.get(f"base_model.model.{name[:6]}.lora_{x}.weight") for x in "BA"]
        b, a = (None if part is None else part.bfloat16().float() for part in pair)
        expected[name] = matrix if a is None else (matrix.float() + 3 * b @ a).bfloat16()
    monkeypatch.setattr(lora_module, "MERGED_ROWS", 5)
    with Widest() as widest:
        merged = adapters.merge(weight)
    assert widest.numel <= 5 * 16
    for name, matrix in rule.merge([merged]).items():
        torch.testing.assert_close(matrix, expected[name])
    parameter = Parameter(weight, False)
    assert torch.equal(adapters.merge(parameter), merged) and not torch.equal(parameter, merged)
