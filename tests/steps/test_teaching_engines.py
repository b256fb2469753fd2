"""The frozen student's weights, given again to an engine that was restarted."""

import random
from types import SimpleNamespace

import pytest

from grpo_mcore.checkpoint.stored import StoredModel
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.steps import teaching_engines


def test_a_refill_that_fails_leaves_the_generators_as_they_were(monkeypatch):
    pushes = []

    def push(version: int) -> None:
        pushes.append(version)
        if len(pushes) > 1:
            raise EngineError("no engine")

    def load(stored, shape, model, role, seed: int) -> list:
        random.seed(seed)
        return []

    monkeypatch.setattr(StoredModel, "load", load)
    monkeypatch.setattr(teaching_engines, "release", lambda chunks: None)
    monkeypatch.setattr(teaching_engines, "WeightSync", lambda *_: SimpleNamespace(push=push))
    pool = SimpleNamespace(role=None, wait_until_ready=lambda: None)
    student = SimpleNamespace(path="student")
    config = SimpleNamespace(student=student, seed=3, rollout=SimpleNamespace(bucket_megabytes=1))
    job = SimpleNamespace(
        shapes={"student": None}, tokenizers={"student": None}, placement="separate"
    )
    teaching_engines.ready_student(None, pool, config, job)
    random.seed(7)
    before = random.getstate()
    with pytest.raises(EngineError):
        pool.refill()
    assert random.getstate() == before
