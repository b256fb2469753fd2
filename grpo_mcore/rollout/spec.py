"""What the engines of a role are started with."""

import os
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from grpo_mcore import device
from grpo_mcore.config import GroupConfig, LoraConfig, RolloutConfig

RECEIVER = "grpo_mcore.rollout.receiver.WeightReceiver"
PROBE = "grpo_mcore.rollout.probe.Probe"
"""What vLLM's workers can do beside their own; the second also tells what modules compute."""
QUANTIZATIONS = {"fp8": "fp8_per_tensor"}
"""vLLM's names of what it rounds weights to as they are loaded; its "fp8" is of rounded files."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for the most that adapters may have."""
TEXTS = ("stop", "bad_words", "structured_outputs")
"""Settings of sampling that engines need a tokenizer for."""


@dataclass(frozen=True)
class EngineSpec:
    """
    Attributes:
        max_model_len: tokens of a prompt and its completion at most.
        is_frozen: the weights will not change.
        trains_adapters: of the weights only those will change that adapters are merged into.
        tokenizer: for engines that are asked for what is said in text (`Request`).
        lora: of adapters that the engines will be sent beside the model.
        worker_extension: RECEIVER, or a class derived from it.
    """

    model_path: str
    dtype: str
    max_model_len: int
    stop_token_ids: list[int]
    tensor_parallel: int = 1
    is_frozen: bool = False
    trains_adapters: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    lora: LoraConfig | None = None
    worker_extension: str = RECEIVER

    @property
    def keeps_weights(self) -> bool:
        """Whether weights wait in host memory while engines sleep: most will be needed again."""
        return self.is_frozen or self.trains_adapters

    def llm_arguments(self, config: RolloutConfig) -> dict:
        """Those of `vllm.LLM`, but for a tokenizer's."""
        arguments = {
            "model": self.model_path,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "tensor_parallel_size": self.tensor_parallel,
            "distributed_executor_backend": "mp" if self.tensor_parallel > 1 else "uni",
            "load_format": "dummy",  # the weights come from the trainer, by the first sync
            "skip_tokenizer_init": True,  # prompts and completions travel as token ids
            "generation_config": "vllm",  # sampling settings are ours, not the model directory's
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": self.worker_extension,
            "disable_log_stats": True,
        }
        if config.quantization:
            arguments["quantization"] = QUANTIZATIONS[config.quantization]
        if self.lora:
            rank = next(rank for rank in LORA_RANKS if rank >= self.lora.r)
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        if self.worker_extension == PROBE:
            # Every token is to be computed, and a compiled model calls no hooks.
            arguments |= {"enable_prefix_caching": False, "enforce_eager": True}
        if device.is_cuda():
            return arguments | {
                "gpu_memory_utilization": config.gpu_memory_utilization,
                "enable_sleep_mode": True,
            }
        return arguments | {
            "enforce_eager": True,
            # vLLM rewinds the generator of a seeded request whose prompt it splits over steps,
            # which the CPU's generator cannot do; so prompts are not split.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, self.max_model_len),
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
        }

    def environment(self) -> dict[str, str]:
        """Variables of the engine's processes."""
        environment = {
            # With one worker the engine runs in the child itself: one process less.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            # Workers are given slots of buckets as Python objects, from this program only.
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        return environment | device_environment(self.tensor_parallel)


def device_environment(tensor_parallel: int) -> dict[str, str]:
    """Variables of vLLM's processes that depend on the device: on GPUs they have `tensor_parallel`
    of them, this process's own and those after it."""
    if device.is_cuda():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = int(os.environ.get("LOCAL_RANK", 0))
        numbers = range(first, first + tensor_parallel)
        names = visible.split(",") if visible else None
        mine = [names[n] if names else str(n) for n in numbers]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines share the cores
        "TORCHDYNAMO_DISABLE": "1",  # compiling one small sampling function takes 10 s
        # Repacking of layers at every sync leaves holes in the heap; these go back to the system
        # (what it costs and saves: docs/weight_sync.md).
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    }


def says_in_text(config: GroupConfig) -> bool:
    """Whether sampling has settings that an engine needs a tokenizer for."""
    return any(getattr(config, name) for name in TEXTS)
