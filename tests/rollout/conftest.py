"""Engines of a small model, local and on a server, and the trainer's model beside them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.nn import ModuleList

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300
MAX_MODEL_LEN = 160
"""So that a prompt can be longer than the 128 tokens of a block of vLLM's cache on CPUs."""


@dataclass
class Rig:
    """A trainer's model with the pool that samples from it."""

    pool: "RolloutPool"  # noqa: F821
    sync: "WeightSync"  # noqa: F821
    chunks: ModuleList
    tokenizer: "PreTrainedTokenizerBase"  # noqa: F821
    path: Path


@pytest.fixture(scope="module", params=["local", pytest.param("server", marks=pytest.mark.slow)])
def rig(request, tiny_models, tmp_path_factory) -> Iterator[Rig]:
    """A rig on each kind of engine, after its first sync (version 1)."""
    path = tiny_models / "qwen2_tied"
    logs = tmp_path_factory.mktemp("logs")
    if request.param == "local":
        with open_rig(path, logs) as opened:
            yield opened
    else:
        with (
            serve_model(path, logs / "server.log", free_port()) as url,
            open_rig(path, logs, url) as opened,
        ):
            yield opened


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def open_rig(path: Path, logs: Path, url: str | None = None) -> Iterator[Rig]:
    """Args:
    url: of the server to use; None: a local engine.
    """
    from grpo_mcore.config import ModelConfig, RolloutConfig
    from grpo_mcore.data.tokenizer import Tokenizer
    from grpo_mcore.models.build import load_model
    from grpo_mcore.models.families import read_shape
    from grpo_mcore.parallel.grid import Layout
    from grpo_mcore.parallel.world import join
    from grpo_mcore.rollout.pool import RolloutPool
    from grpo_mcore.rollout.spec import EngineSpec
    from grpo_mcore.weights.sync import WeightSync

    rollout = RolloutConfig(kv_cache_gib=0.05, deadline_seconds=START_SECONDS)
    if url:
        rollout.engine, rollout.policy_servers = "server", [url]
    shape, tokenizer = read_shape("model.path", str(path)), Tokenizer(str(path))
    with patch.dict(os.environ), ExitStack() as stack:
        os.environ.pop("RANK", None)  # a world of its own, with an address of its own
        world = stack.enter_context(join({"policy": Layout()}, "colocated", START_SECONDS))
        role = world.roles["policy"]
        stops = tokenizer.stop_token_ids()
        spec = EngineSpec(str(path), "float32", MAX_MODEL_LEN, stops, tokenizer=tokenizer.inner)
        pool = RolloutPool(role, spec, 1, rollout, logs)
        try:
            chunks = load_model(shape, ModelConfig(str(path)), role, 0)
            pool.wait_until_ready()
            sync = WeightSync(chunks, shape, role, pool, 1)
            sync.push(1)
            yield Rig(pool, sync, chunks, tokenizer.inner, path)
        finally:
            pool.close()


@contextmanager
def serve_model(path: Path, log: Path, port: int, end: int = signal.SIGTERM) -> Iterator[str]:
    """A vLLM server as a user starts it; gives its URL and ends all its processes with the signal
    `end`."""
    command = [
        ROOT / "examples" / "serve_engine.sh", path, "--host", "127.0.0.1", "--port", port,
        "--dtype", "float32", "--max-model-len", MAX_MODEL_LEN,
        "--kv-cache-memory-bytes", 50_000_000,
    ]  # fmt: skip
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {"PATH": search, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(server, url, log)
        yield url
    finally:
        os.killpg(server.pid, end)
        try:
            server.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # what did not follow
            server.wait()


def _wait_for(server: subprocess.Popen, url: str, log: Path) -> None:
    from grpo_mcore.rollout.server import silence

    give_up = time.monotonic() + START_SECONDS
    while silence(url):
        assert server.poll() is None and time.monotonic() < give_up, log.read_text()[-3000:]
        time.sleep(0.5)
