"""What engines on GPUs are told of sleeping and waking, and when. The engines are stand-ins that
note what they are told: sleep mode needs a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from vllm.config.quantization import resolve_quantization_config

from grpo_mcore import device
from grpo_mcore.config import RolloutConfig
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.rollout import pool as pool_module
from grpo_mcore.rollout.bucket import Delivery
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion, Generated, Request
from grpo_mcore.rollout.spec import EngineSpec

device.prepare()

from grpo_mcore.weights.sync import WeightSync  # noqa: E402

REQUESTS = [Request([5], 4, 0)]
ANSWER = Completion([7], [-1.0], True)
LOADED_ANEW = ["sleep 2", "wake_up ['weights']", "load", "wake_up ['kv_cache', 'scheduling']"]
"""What a restarted engine is told before it generates."""


class StandIn:
    """An engine whose next call of `fails` fails."""

    told: list[str]
    fails: str | None

    def __init__(self, name, environment, log, deadlines):
        self.told.append("new")
        self.calls = []
        self.is_closed = False

    def submit(self, method, *arguments):
        self.calls.append((method, arguments))
        finished = dict.fromkeys(range(len(arguments[0])), ANSWER) if method == "generate" else {}
        return SimpleNamespace(finished=finished, begun=1.0, tokens=1)

    def wait(self, seconds):
        return True

    def result(self, method):
        asked, arguments = self.calls.pop(0)
        assert asked == method
        if method not in ("start", "generate"):
            self.told.append(" ".join([method, *map(str, arguments)]))
        assert not self.is_closed
        if method == StandIn.fails:
            StandIn.fails = None
            raise EngineError(f"{method} failed")
        if method == "generate":
            self.told.append(method)
            return Generated([ANSWER], 1.0, 2.0)
        return None

    def call(self, method, *arguments):
        self.submit(method, *arguments)
        return self.result(method)

    def close(self):
        self.told.append("closed")
        self.is_closed = True


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What engines are told."""
    StandIn.told, StandIn.fails = [], None
    monkeypatch.setattr(pool_module, "Engine", StandIn)
    monkeypatch.setattr(device, "is_cuda", lambda: True)
    monkeypatch.setattr(device, "empty_cache", lambda: None)
    return StandIn.told


def pool_of(
    told: list[str], tmp_path, is_frozen: bool, trains_adapters: bool = False
) -> RolloutPool:
    """One that holds weights, of version 4."""
    role = SimpleNamespace(
        name="student" if is_frozen else "policy",
        rank=0,
        layout=Layout(),
        all_gather=lambda value: [value],
    )
    spec = EngineSpec(
        "model", "bfloat16", 64, [], is_frozen=is_frozen, trains_adapters=trains_adapters
    )
    pool = RolloutPool(role, spec, 1, RolloutConfig(), tmp_path)

    def load() -> None:
        pool.wake("weights")
        told.append("load")
        pool.versions = [4]

    pool.refill = load
    pool.wait_until_ready()
    load()
    told.clear()
    return pool


def test_a_trained_policys_weights_go_and_come_before_the_cache(told, tmp_path):
    pool = pool_of(told, tmp_path, is_frozen=False)
    pool.sleep()
    assert pool.versions == [-1]
    pool.refill()
    assert pool.generate(REQUESTS) == [ANSWER]
    pool.sleep()
    pool.sleep()
    assert told == [
        "sleep 2", "wake_up ['weights']", "load", "wake_up ['kv_cache', 'scheduling']", "generate",
        "sleep 2",
    ]  # fmt: skip


@pytest.mark.parametrize("is_frozen, trains_adapters", [(True, False), (False, True)])
def test_weights_that_hardly_change_wait(told, tmp_path, is_frozen, trains_adapters):
    pool = pool_of(told, tmp_path, is_frozen, trains_adapters)
    pool.sleep()
    assert pool.versions == [4]
    assert pool.generate(REQUESTS) == [ANSWER]
    assert told == ["sleep 1", "wake_up ['weights', 'kv_cache', 'scheduling']", "generate"]


def test_an_engine_that_does_not_wake_is_restarted(told, tmp_path):
    pool = pool_of(told, tmp_path, is_frozen=True)
    pool.sleep()
    StandIn.fails = "wake_up"
    assert pool.generate(REQUESTS) == [ANSWER]
    assert told[2:] == ["closed", "new", *LOADED_ANEW, "generate"]
    assert pool.restarts == [0]


class EmptySync(WeightSync):
    """Of a model without tensors."""

    def __init__(self, pool: RolloutPool):
        self.role, self.pool, self.lora, self.informed = pool.role, pool, None, None
        self.delivery = Delivery(("memory", []), 0, [])
        self.whole = self.changing = range(1)
        self.slots, self.sites = [[]], [0]

    def _send_weights(self, link, sites, numbers):
        link.settle()


def test_an_engine_that_does_not_wake_for_a_sync_costs_one_restart(told, tmp_path):
    pool = pool_of(told, tmp_path, is_frozen=False)
    pool.sleep()
    StandIn.fails = "wake_up"
    EmptySync(pool).push(5)
    assert pool.versions == [5]
    assert told == [
        "sleep 2", "wake_up ['weights']", "closed", "new", "sleep 2", "wake_up ['weights']",
        f"begin_sync {Delivery(('memory', []), 0, [])}",
    ]  # fmt: skip


def test_a_policy_makes_room_for_an_engines_restart(told, tmp_path):
    """It comes back beside an engine that sleeps."""

    @contextmanager
    def room() -> Iterator[None]:
        told.append("policy leaves")
        yield
        told.append("policy returns")

    pool = pool_of(told, tmp_path, is_frozen=False)
    pool.make_room = room
    StandIn.fails = "generate"
    assert pool.generate(REQUESTS) == [ANSWER]
    assert told == [
        "policy leaves", "closed", "new", "sleep 2", "policy returns", *LOADED_ANEW[1:], "generate",
    ]  # fmt: skip


def test_whoever_waits_hears_that_engines_are_at_work(told, tmp_path, monkeypatch):
    answers, waits, beats = [], [], []

    def wait(engine: StandIn, seconds: float) -> bool:
        waits.append(seconds)
        return answers.pop(0)

    pool = pool_of(told, tmp_path, is_frozen=False)
    pool.beat = lambda: beats.append(len(waits))
    pool.config.deadline_seconds = 12
    monkeypatch.setattr(StandIn, "wait", wait)
    for phase in ("generate", "start"):
        answers[:] = [False, False, True]
        waits.clear(), beats.clear()
        if phase == "generate":
            pool.generate(REQUESTS)
        else:
            pool.restart({0: "for this test's sake"})
        assert waits == [6, 6, 6]
        assert beats == [0, 1, 2]


def test_an_engine_that_does_not_fall_asleep_is_restarted_and_then_does(told, tmp_path):
    for is_frozen, loads in ((True, [*LOADED_ANEW, "sleep 1"]), (False, ["sleep 2"])):
        pool = pool_of(told, tmp_path, is_frozen)
        StandIn.fails = "sleep"
        pool.sleep()
        level = f"sleep {1 if is_frozen else 2}"
        assert told == [level, "closed", "new", *loads]
        assert pool.versions == [4 if is_frozen else -1]


def test_weights_that_only_engines_had_are_a_failure_without_anybody_to_give_them(told, tmp_path):
    pool = pool_of(told, tmp_path, is_frozen=False)
    pool.sleep()
    pool.refill = None
    with pytest.raises(pool_module.StaleEngine, match="policy: the engines hold no proven weigh"):
        pool.generate(REQUESTS)


def test_quantization_is_passed_on(told, tmp_path):
    config = RolloutConfig(quantization="fp8")
    arguments = EngineSpec("model", "bfloat16", 64, []).llm_arguments(config)
    assert arguments["enable_sleep_mode"]
    # vLLM has a recipe for it, and needs no file that says how the weights are quantised.
    assert resolve_quantization_config(arguments["quantization"], None)
