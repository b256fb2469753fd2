"""What a worker does with its model and with the trainer's buffers. The model is a small one, which
vLLM's own layerwise reload loads."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Module, Parameter

from grpo_mcore.rollout.bucket import Delivery, Receipt, arrange, checksums, shared_buffer, view
from grpo_mcore.rollout.receiver import WeightReceiver

WEIGHT = torch.arange(12.0).view(4, 3)


class Model(Module):
    def load_weights(self, tensors):
        loaded, parameters = set(), dict(self.named_parameters())
        for name, tensor in tensors:
            parameters[name].weight_loader(parameters[name], tensor)
            loaded.add(name)
        return loaded


@pytest.fixture(scope="module")
def model() -> Module:
    """One layer that is scaled to at most 1 once it is loaded, and keeps the scale."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    class Scaled(QuantizeMethodBase):
        def create_weights(self, layer): ...

        def apply(self, layer): ...

        def process_weights_after_loading(self, layer):
            scale = layer.weight.abs().max()
            layer.weight = Parameter(layer.weight / scale, False)
            layer.weight_scale = Parameter(scale, False)
            del layer.unused_scale

    model = Model()
    model.layer = layer = Module()
    layer.quant_method = Scaled()
    layer.weight = Parameter(torch.ones(4, 3), False)
    layer.unused_scale = Parameter(torch.zeros(0), False)
    record_metadata_for_reloading(model)
    layer.quant_method.process_weights_after_loading(layer)
    return model


class Worker(WeightReceiver):
    """One on a GPU, as far as that shows."""

    rank, device = 0, SimpleNamespace(type="cuda")
    parallel_config = SimpleNamespace(tensor_parallel_size=1)

    def __init__(self, model: Module):
        text = SimpleNamespace(tie_word_embeddings=False)
        config = SimpleNamespace(hf_text_config=text, dtype=torch.float32)
        self.model_runner = SimpleNamespace(model=model, model_config=config)


@pytest.fixture
def waits(monkeypatch) -> list:
    """For the device, by what the layer held then."""
    found = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append(None))
    return found


def sync(worker: Worker, tensors: dict[str, torch.Tensor], **options) -> Receipt:
    begin_sync(worker, tensors, **options)
    return worker.end_sync()


def begin_sync(worker: Worker, tensors: dict[str, torch.Tensor], **options) -> None:
    """As far as that all `tensors`, in one bucket, are received."""
    slots, size = arrange({name: tuple(t.shape) for name, t in tensors.items()}, torch.float32)
    buffer, path = shared_buffer(max(size, 1))
    for name, place in view(buffer, slots).items():
        place.copy_(tensors[name])
    worker.begin_sync(Delivery(("memory", [path]), len(buffer), [slots], **options))
    worker.receive_bucket(0, 0)


def test_what_vllm_makes_of_the_weights_is_not_missed(model, waits):
    for factor in (1.0, 2.0):
        receipt = sync(Worker(model), {"layer.weight": factor * WEIGHT})
        assert receipt.not_loaded == []
        assert receipt.checksums == {"layer.weight": checksums([factor * WEIGHT]).item()}
        assert model.layer.weight_scale == 11 * factor
        assert torch.equal(model.layer.weight, WEIGHT / 11)


@pytest.mark.parametrize("is_last", [True, False])
def test_buffers_go_with_the_last_sync(model, waits, is_last):
    worker = Worker(model)
    sync(worker, {"layer.weight": WEIGHT}, is_last=is_last)
    assert bool(worker.buffers) is not is_last


def test_a_weight_that_is_not_sent_is_missed(model, waits):
    assert sync(Worker(model), {}).not_loaded == ["layer.weight"]


def test_a_sync_that_was_broken_off_leaves_nothing(waits):
    """A server goes on when its trainer is gone; the next one starts from the first bucket."""
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    model = Model()
    model.layer = layer = Module()
    layer.gate, layer.up = Parameter(torch.ones(4, 3), False), Parameter(torch.ones(4, 3), False)
    record_metadata_for_reloading(model)
    worker = Worker(model)
    begin_sync(worker, {"layer.gate": WEIGHT})
    assert sync(worker, {"layer.gate": 2 * WEIGHT, "layer.up": 3 * WEIGHT}).not_loaded == []
    assert torch.equal(layer.gate, 2 * WEIGHT)
    assert torch.equal(layer.up, 3 * WEIGHT)


def test_what_vllm_removes_is_not_missed_after_one_that_was_broken_off(model, waits):
    worker = Worker(model)
    begin_sync(worker, {})
    assert sync(worker, {"layer.weight": WEIGHT}).not_loaded == []
    assert torch.equal(model.layer.weight, WEIGHT / 11)


def test_a_gpu_has_read_the_buffer_before_it_may_be_written_again(model, waits):
    sync(Worker(model), {"layer.weight": WEIGHT})
    assert waits
