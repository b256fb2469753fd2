"""Adapters go to an engine through a directory in the run's logs, which does not stay there."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grpo_mcore.config import LoraConfig
from grpo_mcore.rollout.bucket import Receipt, checksums
from grpo_mcore.weights import sync as sync_module
from grpo_mcore.weights.sync import WeightSync, _Link

TENSORS = {"lora_A": torch.ones(2, 3), "lora_B": torch.zeros(3, 2)}


class Engine:
    """Has read whatever there is."""

    def __init__(self):
        self.read = []

    def submit(self, method, directory, version):
        self.read.append(sorted(file.name for file in Path(directory).iterdir()))

    def result(self, method):
        sums = checksums(list(TENSORS.values())).tolist()
        return [Receipt(dict(zip(TENSORS, sums, strict=True)), [])]


@pytest.fixture
def sync(monkeypatch, tmp_path) -> WeightSync:
    monkeypatch.setattr(sync_module, "gather_adapters", lambda *_: TENSORS)
    sync = WeightSync.__new__(WeightSync)
    sync.chunks = sync.shape = sync.adapters = None
    sync.role, sync.lora = SimpleNamespace(name="policy"), LoraConfig()
    sync.pool = SimpleNamespace(log_dir=tmp_path / "logs", replica=1)
    return sync


def test_nothing_stays_and_leftovers_are_replaced(sync):
    leftover = sync.pool.log_dir / "policy-1.adapters"
    leftover.mkdir(parents=True)
    (leftover / "of a killed run").touch()
    engine = Engine()
    assert sync._send_adapters(_Link(engine), 3) is None
    assert engine.read == [["adapter_config.json", "adapter_model.safetensors"]]
    assert list(sync.pool.log_dir.iterdir()) == []


def test_what_cannot_be_written_is_a_failure_of_the_engine(sync):
    sync.pool.log_dir.touch()  # so it cannot have files
    engine = Engine()
    link = _Link(engine)
    assert sync._send_adapters(link, 3) is None
    assert link.failure.startswith("adapters cannot be written: ") and engine.read == []
