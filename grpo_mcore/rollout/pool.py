"""All engines of a role, used by its ranks together."""

import os
from collections import deque
from pathlib import Path

from grpo_mcore import device
from grpo_mcore.config import LoraConfig, RolloutConfig
from grpo_mcore.errors import KnownError
from grpo_mcore.parallel.groups import Role
from grpo_mcore.rollout.engine import Engine, EngineError
from grpo_mcore.rollout.requests import Completion, Generated, Request

WAKE_ORDER = ("weights", "kv_cache", "scheduling")
"""What wakes after sleep. Weights come first and are loaded before the key-value cache takes its
memory, so that old weights, new weights and cache never stand side by side."""


WORKER_EXTENSION = "grpo_mcore.rollout.receiver.WeightReceiver"


LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for the most that adapters may have."""


class StaleEngine(KnownError, RuntimeError):
    """Generation was asked of an engine that does not hold the trainer's weights."""


class RolloutPool:
    """The engines of `role`. Every method is called by all its ranks, with the same arguments.

    Attributes:
        versions: by engine, the trainer version whose weights it was proven to hold; -1: none.
    """

    def __init__(
        self,
        role: Role,
        model_path: str,
        dtype: str,
        max_model_len: int,
        stop_token_ids: list[int],
        engines: int,
        tensor_parallel: int,
        config: RolloutConfig,
        log_dir: Path,
        lora: LoraConfig | None = None,
    ):
        """Starts the engines without waiting for them; `wait_until_ready` does.

        Args:
            lora: of adapters that the engines will be sent beside the model.
        """
        self.role, self.engines, self.versions = role, engines, [-1] * engines
        self.tensor_parallel, self.ready = tensor_parallel, False
        self.asleep: set[str] = set()
        self.pending: deque[Ticket] = deque()
        replica, place = divmod(role.rank, role.layout.size // engines)
        self.engine: Engine | None = None
        self.replica = replica
        if place == 0 and replica < engines:
            name = f"{role.name}-{replica}"
            self.engine = Engine(
                name,
                _environment(tensor_parallel),
                log_dir / f"{name}.log",
                config.deadline_seconds,
            )
            arguments = _llm_arguments(model_path, dtype, max_model_len, tensor_parallel, config)
            if lora:
                rank = next(rank for rank in LORA_RANKS if rank >= lora.r)
                arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
            self.engine.submit("start", arguments, stop_token_ids)

    @property
    def version(self) -> int:
        """The trainer version that every engine holds, or an older one; -1: some hold none."""
        return min(self.versions)

    def behind(self, version: int) -> list[int]:
        """Engines that do not hold the weights of trainer `version`."""
        return [engine for engine, held in enumerate(self.versions) if held != version]

    def restart(self, failures: dict[int, str]) -> None:
        """Raises EngineError on every rank.

        Args:
            failures: by engine, what happened to it.
        """
        raise EngineError("\n".join(failures.values()))

    def leader(self, engine: int) -> int:
        """The rank that talks to `engine`."""
        return engine * (self.role.layout.size // self.engines)

    def wait_until_ready(self) -> None:
        """Returns when the engines accept weights."""
        if self.engine and not self.ready:
            self.engine.result("start")
            self.ready = True

    def submit(self, requests: list[Request]) -> "Ticket":
        """Starts generating; the ticket's `result()` waits for it.

        Raises:
            StaleEngine: before the first sync, or after one that was not proven.
        """
        if self.version < 0:
            raise StaleEngine(f"{self.role.name}: the engines hold no proven weights")
        self.wake(*WAKE_ORDER)
        if self.engine:
            self.engine.submit("generate", requests[self.replica :: self.engines])
        ticket = Ticket(self, len(requests))
        self.pending.append(ticket)
        return ticket

    def generate(self, requests: list[Request]) -> list[Completion]:
        """One completion a request, in order, on every rank."""
        return self.submit(requests).result().completions

    def require(self, version: int) -> None:
        """Raises StaleEngine unless the engines hold the weights of trainer `version`."""
        if self.behind(version):
            raise StaleEngine(
                f"{self.role.name}: engines hold version {self.version}, trainer is at {version}"
            )

    def sleep(self) -> None:
        """Frees the engines' device memory until they are needed; the weights wait in host memory.
        vLLM has this on GPUs only; on a CPU nothing happens."""
        if device.is_cuda() and not self.asleep:
            if self.engine:
                self.engine.call("sleep")
            self.asleep = set(WAKE_ORDER)
            self.role.all_gather(None)  # an engine's workers use other ranks' devices too

    def wake(self, *parts: str) -> None:
        """Takes back the memory of `parts` that sleep."""
        sleeping = [part for part in parts if part in self.asleep]
        if sleeping:
            device.empty_cache()
            self.role.all_gather(None)
            if self.engine:
                self.engine.call("wake_up", sleeping)
            self.asleep -= set(sleeping)
            self.role.all_gather(None)

    def collect_until(self, ticket: "Ticket") -> None:
        """Answers come in the order of their requests, so earlier tickets are filled on the way."""
        while ticket.generated is None:
            oldest = self.pending.popleft()
            share = self.engine.result("generate") if self.engine else None
            shares = [s for s in self.role.all_gather(share) if s is not None]
            oldest.generated = Generated(
                [
                    shares[i % self.engines].completions[i // self.engines]
                    for i in range(oldest.size)
                ],
                min(s.started for s in shares),
                max(s.finished for s in shares),
            )

    def close(self) -> None:
        if self.engine:
            self.engine.close()


class Ticket:
    """A generation under way."""

    def __init__(self, pool: RolloutPool, size: int):
        self.pool, self.size = pool, size
        self.generated: Generated | None = None

    def result(self) -> Generated:
        self.pool.collect_until(self)
        return self.generated


def _llm_arguments(
    model_path: str, dtype: str, max_model_len: int, tensor_parallel: int, config: RolloutConfig
) -> dict:
    arguments = {
        "model": model_path,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": tensor_parallel,
        "distributed_executor_backend": "mp" if tensor_parallel > 1 else "uni",
        "load_format": "dummy",  # the weights come from the trainer, by the first sync
        "skip_tokenizer_init": True,  # prompts and completions travel as token ids
        "generation_config": "vllm",  # sampling settings are ours, not the model directory's
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        "disable_log_stats": True,
    }
    if device.is_cuda():
        return arguments | {
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enable_sleep_mode": True,
        }
    return arguments | {
        "enforce_eager": True,
        # vLLM rewinds the generator of a seeded request whose prompt it splits over steps, which
        # the CPU's generator cannot do; so prompts are not split.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_len),
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
    }


def _environment(tensor_parallel: int) -> dict[str, str]:
    environment = {
        # With one worker the engine runs in the child itself: one process less.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
        # Workers are given slots of buckets as Python objects, from this program only.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    if device.is_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = int(os.environ.get("LOCAL_RANK", 0))
        numbers = range(first, first + tensor_parallel)
        names = visible.split(",") if visible else None
        mine = [names[n] if names else str(n) for n in numbers]
        return environment | {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
    return environment | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        # Repacking of layers at every sync leaves holes in the heap; these go back to the system.
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
        "TORCHDYNAMO_DISABLE": "1",  # compiling one small sampling function takes 10 s
    }
