"""A policy that has left its device and returned trains on as one that stayed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from grpo_mcore import device
from grpo_mcore.config import ModelConfig, TeacherGRPOConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from tests.checkpoint.resume_worker import batch, loss

device.prepare()

from grpo_mcore.training.offload import offload  # noqa: E402
from grpo_mcore.training.policy import Policy  # noqa: E402


@pytest.fixture(scope="module")
def role() -> Iterator[Role]:
    with join({"policy": Layout()}, "colocated", 60) as world:
        yield world.roles["policy"]


def test_views_stay_views():
    whole = torch.arange(10.0)
    part, empty = whole[3:5], torch.empty(0)
    bring_back = offload([whole, part, empty])
    assert whole.untyped_storage().nbytes() == 0
    bring_back()
    assert torch.equal(whole, torch.arange(10.0))
    part += 1
    assert whole[3] == 4


def test_away_is_not_left_twice_nor_with_fp8(role, tiny_models):
    model = ModelConfig(str(tiny_models / "llama_tied"))
    shape = read_shape("teacher.path", model.path)
    policy = Policy(role, shape, model, TeacherGRPOConfig(teacher=model))

    def is_there() -> bool:
        return all(p.untyped_storage().nbytes() for p in policy.chunks.parameters())

    with pytest.raises(RuntimeError), policy.away():
        assert not is_there()
        raise RuntimeError
    assert is_there()
    policy.free_training_state()
    assert is_there()
    with policy.away():
        assert not is_there()
    assert is_there() and policy.gone
    policy.leave_device()
    with policy.away():
        assert not is_there()
    assert not is_there()
    policy.return_parameters()
    assert is_there() and policy.gone
    policy.return_to_device()
    assert is_there() and not policy.gone
    policy.holds_fp8 = True
    with policy.away():
        assert is_there()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_training_goes_on_exactly(role, tiny_models, dtype, distributed):
    model = ModelConfig(str(tiny_models / "llama_tied"), dtype=dtype)
    config = TeacherGRPOConfig(teacher=model, learning_rate=1e-3, max_steps=4)
    config = replace(config, distributed_optimizer=distributed)
    shape = read_shape("teacher.path", model.path)
    found = []
    for leaves in (False, True):
        policy = Policy(role, shape, model, config)
        losses = []
        for step in range(3):
            losses.append(policy.compute_gradients(batch(step), loss)["loss"])
            policy.step()
            if leaves:
                held = [*policy.chunks.parameters()]
                before = [p.clone() for p in held]
                policy.free_training_state()
                assert all(map(torch.equal, held, before))
                assert not any(p.main_grad.untyped_storage().nbytes() for p in held)
                states = policy.optimizer.optimizer.state.values()
                moments = [state["exp_avg"] for state in states]
                assert moments and not any(m.untyped_storage().nbytes() for m in moments)
                policy.leave_device()
                assert not any(p.untyped_storage().nbytes() for p in held)
            policy.return_to_device()
        found.append((losses, [p.clone() for p in policy.chunks.parameters()]))
    (stayed, weights), (left, others) = found
    assert left == stayed
    assert all(map(torch.equal, weights, others))
