"""The learning rate of each update."""

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from grpo_mcore.config import TrainingConfig
from grpo_mcore.training.optimizer import schedule


class OneParameter:
    """What the scheduler needs of an optimizer."""

    def __init__(self):
        self.param_groups = [{"params": [torch.zeros(1)], "lr": 0.0}]


def rates(resumed_after: int = 0, **settings) -> list[float]:
    """The rate of each update; with `resumed_after`, of those after a resume."""
    config = TrainingConfig(learning_rate=1.0, **settings)
    optimizer = OneParameter()
    scheduler = OptimizerParamScheduler(optimizer, **schedule(config))
    if resumed_after:
        before = TrainingConfig(learning_rate=0.5, max_steps=resumed_after)
        saved = OptimizerParamScheduler(OneParameter(), **schedule(before))
        saved.step(resumed_after)
        scheduler.load_state_dict(saved.state_dict())
    found = []
    for _ in range(config.max_steps - resumed_after):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_constant_after_warm_up():
    assert rates(max_steps=5, warmup_steps=2) == [0.5, 1, 1, 1, 1]


@pytest.mark.seed(48)
def test_linear_decay_leaves_no_update_at_zero():
    assert rates(max_steps=4, lr_scheduler_type="linear") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert rates(max_steps=1, lr_scheduler_type="linear") == pytest.approx([0.5])


def test_cosine_decay_is_symmetric():
    found = rates(max_steps=3, lr_scheduler_type="cosine")
    assert found[1] == pytest.approx(0.5) and found[0] + found[2] == pytest.approx(1)


def test_decay_begins_after_the_stable_steps():
    found = rates(max_steps=6, warmup_steps=1, stable_steps=2, lr_scheduler_type="linear")
    assert found == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])


def test_a_resumed_run_follows_its_own_settings():
    found = rates(resumed_after=2, max_steps=5, lr_scheduler_type="linear")
    assert found == pytest.approx([1 / 2, 1 / 3, 1 / 6])
