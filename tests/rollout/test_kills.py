"""The kill matrix: engines and their workers are killed in every phase, and nothing is lost.

`pytest -v tests/rollout/test_kills.py` shows the outcome of every cell.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_mcore import device
from grpo_mcore.config import ModelConfig, RolloutConfig
from grpo_mcore.models.families import read_shape
from grpo_mcore.parallel.grid import Layout
from grpo_mcore.parallel.groups import Role
from grpo_mcore.parallel.world import join
from grpo_mcore.rollout import pool as pool_module
from grpo_mcore.rollout.engine import EngineError
from grpo_mcore.rollout.pool import RolloutPool
from grpo_mcore.rollout.requests import Completion, Request
from grpo_mcore.rollout.spec import EngineSpec
from tests.rollout.kills import DEATH_AFTER, killing, processes

device.prepare()

from grpo_mcore.models.build import load_model  # noqa: E402
from grpo_mcore.weights.sync import WeightSync  # noqa: E402

pytestmark = [pytest.mark.engine]

REQUESTS = [Request([5 + n, 6, 7], 3 + 4 * n, seed=n) for n in range(24)]
"""Of which those that come first are finished first."""
DEADLINE = 300.0


@pytest.fixture(scope="module")
def role() -> Iterator[Role]:
    with join({"policy": Layout()}, "colocated", DEADLINE) as world:
        yield world.roles["policy"]


class Rollout:
    """A pool of one engine, and the weights for it."""

    def __init__(self, role: Role, model: Path, logs: Path, tensor_parallel: int = 1, **settings):
        self.spec = EngineSpec(str(model), "float32", 128, [], tensor_parallel)
        self.config = RolloutConfig(kv_cache_gib=0.05, deadline_seconds=DEADLINE, **settings)
        self.logs = logs
        shape = read_shape("model.path", str(model))
        self.chunks = load_model(shape, ModelConfig(str(model)), role, 0)
        self.shape, self.role = shape, role

    def start(self) -> None:
        self.pool = RolloutPool(self.role, self.spec, 1, self.config, self.logs)
        self.sync = WeightSync(self.chunks, self.shape, self.role, self.pool, 1)
        self.pool.refill = lambda: self.sync.push(1)
        self.pool.wait_until_ready()

    def generate(self) -> list[Completion]:
        return self.pool.generate(REQUESTS)


@pytest.fixture(scope="module")
def rollout(role, tiny_models, tmp_path_factory) -> Iterator[Rollout]:
    """It has been killed at its start."""
    rollout = Rollout(role, tiny_models / "llama", tmp_path_factory.mktemp("logs"))
    with killing("start"):
        rollout.start()
    rollout.sync.push(1)
    yield rollout
    rollout.pool.close()


@pytest.fixture(scope="module")
def expected(rollout) -> list[Completion]:
    """What the engine says when it is left alone."""
    return rollout.generate()


@pytest.fixture(scope="module")
def sharded(role, tiny_models, tmp_path_factory) -> Iterator[Rollout]:
    """Its engine has two tensor parallel workers."""
    rollout = Rollout(role, tiny_models / "llama", tmp_path_factory.mktemp("logs"), 2)
    rollout.start()
    rollout.sync.push(1)
    rollout.expected = rollout.generate()
    yield rollout
    rollout.pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["engine", "worker"])
@pytest.mark.parametrize("phases", ["start", "generate", "sync", "generate start sync"])
def test_two_workers(sharded, victim, phases):
    pool = sharded.pool
    with killing(*phases.split(), victim=victim):
        if phases == "start":
            pool.restart({0: "for this test's sake"})
        if phases in ("start", "sync"):
            sharded.sync.push(pool.version + 2)
        assert sharded.generate() == sharded.expected


def test_engine_killed_at_start(rollout, expected):
    assert len(expected) == len(REQUESTS)
    assert rollout.pool.versions == [1]


def test_engine_killed_in_mid_generation(rollout, expected):
    """What it had finished is not asked for again."""
    with killing("generate") as calls:
        assert rollout.generate() == expected
    before, after = (len(call.finished) for call in calls)
    assert before >= DEATH_AFTER
    assert before + after == len(REQUESTS)
    assert rollout.generate() == expected


def test_engine_killed_in_mid_sync(rollout, expected):
    with killing("sync"):
        sent = rollout.sync.push(2)
    assert rollout.pool.versions == [2]
    assert sent == rollout.sync.push(1)
    assert rollout.generate() == expected


def test_engine_killed_three_times_in_a_row_and_then_no_more(rollout, expected, capsys):
    """Calls made ahead are made again, too."""
    with killing("generate", "start", "start") as calls:
        tickets = [rollout.pool.submit(requests) for requests in (REQUESTS, REQUESTS[:4])]
        found = [ticket.result().completions for ticket in tickets]
    assert found == [expected, expected[:4]]
    assert len(calls) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "restart" in line]
    assert [line[:33] for line in lines] == [
        f"warning: restart {n} of 3 of policy-0" [:33] for n in (1, 2, 3)
    ]  # fmt: skip


def test_whoever_waits_is_told_how_far_it_is(rollout, expected, capsys, monkeypatch):
    monkeypatch.setattr(pool_module, "PROGRESS_SECONDS", 0.02)
    assert rollout.generate() == expected
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("policy-0: ") for line in lines)
    told = [int(line.split()[1]) for line in lines]
    assert len(told) > 3 and told == sorted(told)
    assert lines[-1].split(": ")[1].startswith(f"{told[-1]} of {len(REQUESTS)} completions, ")


def test_a_failure_in_a_call_is_the_engines_own_words(rollout):
    with pytest.raises(
        EngineError, match=r"(?s)policy-0 failed in 'generate' \(.*0.log.*context length is 128"
    ):
        rollout.pool.engine.call("generate", [Request([5] * 200, 4, seed=0)])


def test_silence_past_the_deadline_is_an_end_too(rollout, expected):
    """The last of the module: this engine is given up."""
    pool = rollout.pool
    pool.config.max_engine_restarts = 0
    pool.engine.deadlines["generate"] = 0.5
    (engine,) = processes(pool.engine)["engine"]
    engine.suspend()
    with pytest.raises(EngineError) as raised:
        pool.generate(REQUESTS)
    first, reason = str(raised.value).split(": ", 1)
    assert first == (
        "engine policy-0 failed again after 0 restarts in a row (rollout.max_engine_restarts=0)"
    )
    silent = "engine policy-0: nothing heard of 'generate' for 0 s (rollout.generate_seconds); "
    assert reason == f"{silent}its log: {pool.engine.log}"
    for use in (lambda: pool.generate(REQUESTS), lambda: rollout.sync.push(3)):
        with pytest.raises(EngineError, match="failed again after 0 restarts"):
            use()
    assert not engine.is_running()
