"""Programs of tests in processes that need import nothing: ranks, and engines with their guards.

What torchrun, or the start of an engine, does itself is not tested by these. Tests of that start
the real ones (`torchrun` in tests/end_to_end/conftest.py, the marker `real_engines`).
"""

import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

from grpo_mcore.rollout import engine, guard
from grpo_mcore.rollout.guard import NO_SOCKET
from tests.fork_server import Forked, Server, exit_with

RANKS, ENGINES = "TESTS_FORK_RANKS", "TESTS_FORK_ENGINES"
"""Environment variables with the sockets of the fork servers."""
OF_RANKS = ["grpo_mcore.trainers", "transformers", "peft", "tests.forked"]
OF_ENGINES = [
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online",
    "vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
    "vllm.model_executor.models.qwen3",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "grpo_mcore.rollout.child",
    "grpo_mcore.rollout.receiver",
    "tests.forked",
]
ENGINE_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""What an engine has (`EngineSpec.environment`) that libraries read as they are loaded."""


cores = 1
"""Ranks that the test module under way may start (its marker `cores`)."""
are_real = False
"""Whether that module wants engines to start as they do for users."""
_posix_spawn = os.posix_spawn
REALLY = engine.start_guarded
"""How engines are started outside tests."""


def start_servers() -> list[Server]:
    """They import nothing before they are first asked."""
    servers = [
        Server.start(OF_RANKS, {"OMP_NUM_THREADS": "1"}),
        Server.start(OF_ENGINES, ENGINE_VARIABLES),
    ]
    os.environ[RANKS], os.environ[ENGINES] = (server.path for server in servers)
    return servers


def run_forked(
    script: Path, arguments: list, environment: dict[str, str], timeout: float, ranks: int = 0
) -> tuple[int, str]:
    """Runs a script to its end, as `python SCRIPT`, or as so many ranks, as torchrun starts them.

    Returns:
        The first exit code that is not 0, or 0, and what was printed.
    """
    from torch.distributed import TCPStore

    assert ranks <= cores, f"mark the module pytest.mark.cores({ranks})"
    server, store = Server(os.environ[RANKS]), None
    numbered = [environment]
    if ranks:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        numbered = [
            environment
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for rank in range(ranks)
        ]
    command = [str(part) for part in (script, *arguments)]
    with tempfile.TemporaryFile() as output:
        files = dict.fromkeys((1, 2), output.fileno())
        processes = [server.fork("tests.forked:run_script", command, e, files) for e in numbered]
        code = _join(processes, timeout)
        output.seek(0)
        return code, output.read().decode()


def _join(processes: list[Forked], timeout: float) -> int:
    """Waits for all; when one fails, or time is up, the others are ended."""
    until, code = time.monotonic() + timeout, 0
    left = list(processes)
    while left and not code:
        if time.monotonic() > until:
            code = 124
        select.select([p.connection for p in left if p.returncode is None], [], [], 0.2)
        left = [p for p in left if p.poll() is None]
        code = code or next((p.returncode for p in processes if p.returncode), 0)
    for process in left:
        process.terminate()
    for process in left:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return code


def run_script() -> None:
    """In a forked process: what `python SCRIPT` does."""
    engine.start_guarded = start_guarded
    script = sys.argv[0]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def refuse(*_, **__) -> None:
    raise AssertionError("mark the module pytest.mark.engine")


def start_guarded(
    command: list[str], environment: dict[str, str], log: Path, socket: int = NO_SOCKET
) -> Forked:
    """In place of `rollout.engine.start_guarded`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(engine._TORCHRUN)}
    arguments = ["guard", str(os.getpid()), str(socket), *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output, open(os.devnull) as nothing:
        files = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno()}
        if socket != NO_SOCKET:
            files[socket] = socket
        return Server(os.environ[ENGINES]).fork(
            "tests.forked:run_guard", arguments, inherited | environment, files, own_session=True
        )


def run_guard() -> None:
    """In a forked process: what `python -m grpo_mcore.rollout.guard` does. The engine is a fork of
    it, and as its parent is the server, a thread tells it of PARENT's end."""
    guard.end_with_parent = _end_with
    os.posix_spawn = _fork
    guard.main()


def _end_with(parent: int, signal_number: int) -> bool:
    try:
        parent_ends = os.pidfd_open(parent)
    except ProcessLookupError:
        return False

    def wait() -> None:
        select.select([parent_ends], [], [])
        os.kill(os.getpid(), signal_number)

    Thread(target=wait, daemon=True).start()
    return True


def _fork(path: str, command: list[str], environment: dict, setsigmask: list) -> int:
    """os.posix_spawn of `python -m MODULE ...`."""
    pid = os.fork()
    if pid == 0:
        os.posix_spawn = _posix_spawn
        signal.pthread_sigmask(signal.SIG_SETMASK, setsigmask)
        exit_with(f"{command[2]}:main", command[2:], environment)
    return pid
