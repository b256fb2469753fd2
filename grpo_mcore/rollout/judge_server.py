"""The run's own judge: vLLM's OpenAI-compatible server of one model."""

import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread

from tqdm import tqdm

from grpo_mcore import device
from grpo_mcore.config import JudgeServerConfig, RolloutConfig
from grpo_mcore.rollout.engine import CLOSE_SECONDS, EngineError, last_lines, start_guarded
from grpo_mcore.rollout.server import API_KEY, POLL_SECONDS, silence
from grpo_mcore.rollout.spec import device_environment

MODULE = "grpo_mcore.rollout.api_server"


class JudgeServer:
    """Starts the server in processes of its own, and again, under the same address, when it dies:
    `rollout.max_engine_restarts` times at most.

    Attributes:
        base_url: of the OpenAI API.
        api_key: what the server wants to be shown; only those who are told can use it.
    """

    def __init__(self, judge: JudgeServerConfig, rollout: RolloutConfig, host: str, log: Path):
        """Starts it without waiting for it.

        Args:
            host: the address it listens at.
        """
        self.judge, self.rollout, self.host, self.log = judge, rollout, host, log
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        self.base_url = f"http://{host}:{self.port}/v1"
        self.api_key = secrets.token_urlsafe()
        self.restarts = 0
        self.is_closed = False
        self.starting = Lock()
        """Held where the server is started or closed."""
        self.process = self._start()

    def wait_until_ready(self, beat: Callable[[], None]) -> None:
        """Returns when it answers; from then on it is restarted when it dies.

        Args:
            beat: called again and again meanwhile.

        Raises:
            EngineError: when it ends, or does not answer within `rollout.start_seconds`.
        """
        seconds = self.rollout.start_seconds or self.rollout.deadline_seconds
        give_up = time.monotonic() + seconds
        while reason := silence(f"http://{self.host}:{self.port}"):
            code = self.process.poll()
            if code is not None:
                raise EngineError(
                    f"the judge's server died (exit code {code}); {self.log} ends:\n"
                    f"{last_lines(self.log)}"
                )
            if time.monotonic() > give_up:
                raise EngineError(
                    f"the judge's server: nothing heard of it for {seconds:.0f} s "
                    f"(rollout.start_seconds): {reason}; its log: {self.log}"
                )
            beat()
            time.sleep(POLL_SECONDS)
        Thread(target=self._keep_alive, name="judge server", daemon=True).start()

    def close(self) -> None:
        with self.starting:
            self.is_closed = True
            self.process.terminate()
        self.process.wait(CLOSE_SECONDS)

    def _keep_alive(self) -> None:
        """Runs in a thread; a guard that it starts ends with it, so it waits for that."""
        most = self.rollout.max_engine_restarts
        while True:
            code = self.process.wait()
            with self.starting:
                if self.is_closed:
                    return
                if self.restarts == most:
                    tqdm.write(
                        f"warning: the judge's server died again (exit code {code}) after {most} "
                        f"restarts (rollout.max_engine_restarts={most}) and is given up; its log: "
                        f"{self.log}"
                    )
                    return
                self.restarts += 1
                tqdm.write(
                    f"warning: restart {self.restarts} of {most} of the judge's server (exit code "
                    f"{code}); its log: {self.log}"
                )
                self.process = self._start()

    def _start(self):
        judge = self.judge
        options = {
            "model": judge.path,
            "dtype": judge.dtype,
            "max-model-len": judge.max_model_len,
            "tensor-parallel-size": judge.tensor_parallel,
            "distributed-executor-backend": "mp" if judge.tensor_parallel > 1 else "uni",
            "max-num-seqs": self.rollout.max_num_seqs,
            "generation-config": "vllm",  # sampling is as the requests say, not the directory
            # White space without end would be valid JSON.
            "structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
            "host": self.host,
            "port": self.port,
        }
        if device.is_cuda():
            options["gpu-memory-utilization"] = self.rollout.gpu_memory_utilization
        else:
            options["kv-cache-memory-bytes"] = int(self.rollout.kv_cache_gib * 2**30)
        given = {f"--{name}={value}" for name, value in options.items() if value is not None}
        flags = [] if device.is_cuda() else ["--enforce-eager"]
        environment = device_environment(judge.tensor_parallel) | {
            API_KEY: self.api_key,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
        }
        return start_guarded([MODULE, *sorted(given), *flags], environment, self.log)
