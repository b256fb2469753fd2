"""The only file that knows CUDA from CPU: backend, memory, the bridge that runs Megatron on a CPU.

Megatron-Core 0.16 names `torch.cuda` in some forty places and has no switch for it. On a machine
without a GPU `prepare()` answers those calls for the CPU, once, before Megatron is first imported;
Megatron itself stays unmodified. On a GPU `prepare()` only selects this process's device.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import torch
from torch.utils._device import _device_constructors

MEGATRON_SERIES = "0.16."
"""The bridge relies on what Megatron does inside, so it is bound to one series."""

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like")
_prepared = False


def is_cuda() -> bool:
    """Whether this process computes on an NVIDIA GPU."""
    return torch.cuda.is_available()


def local_count() -> int:
    """Processes to start on this machine: one a GPU, or one."""
    return torch.cuda.device_count() if is_cuda() else 1


def torch_device() -> torch.device:
    """The device of this process's models."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else torch.device("cpu")


def enter_thread(chosen: torch.device) -> None:
    """Selects `chosen`, the `torch_device()` of the thread that started this one: to CUDA a new
    thread is on device 0."""
    if is_cuda():
        torch.cuda.set_device(chosen)


def backend() -> str:
    """torch.distributed backend. On GPUs, gloo serves the exchange of Python objects."""
    return "cpu:gloo,cuda:nccl" if is_cuda() else "gloo"


def empty_cache() -> None:
    """Returns cached device memory, so that an engine on the same device can use it."""
    if is_cuda():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Waits for the device, so that a clock read afterwards counts its work."""
    if is_cuda():
        torch.cuda.synchronize()


def exchange_bytes(most: int) -> int:
    """Bytes that ranks shall exchange at once, of `most` there are. NCCL wants long messages. Gloo
    copies each, and malloc keeps more of longer copies: with a model of 500 M parameters and two
    ranks, pieces of 8 MiB took 75 MiB of a rank's memory and those of half a MiB 5."""
    return most // 8 if is_cuda() else 512 << 10


def total_memory() -> int | None:
    """Bytes of this process's device; None on a CPU, whose memory all processes share."""
    return torch.cuda.get_device_properties(0).total_memory if is_cuda() else None


def compute_capability() -> tuple[int, int] | None:
    """The GPU's architecture, such as (9, 0); None where there is no GPU."""
    return torch.cuda.get_device_capability() if is_cuda() else None


def transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be used in this process; None where it can."""
    return _admit_transformer_engine()


def transformer_overrides() -> dict:
    """TransformerConfig fields that depend on the device."""
    return {
        "use_cpu_initialization": not is_cuda(),
        "bias_dropout_fusion": is_cuda(),
        # These two need Apex, which stays optional.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        # These two compute in bf16 what the rollout engine computes in float32, and were found to
        # cause most of the log-probability mismatch (NVIDIA-NeMo/RL issue 1801).
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }


def prepare() -> None:
    """Readies this process for Megatron. Idempotent; the package calls it before the first import
    of Megatron.

    Raises:
        RuntimeError: on a CPU, when Megatron-Core is not of the series the bridge was made for.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True  # already while Megatron is imported below
    try:
        _prepare()
    except BaseException:
        _prepared = False
        raise


def _prepare() -> None:
    # Megatron warns at every import of each optional package that is missing.
    warnings.filterwarnings("ignore", module="megatron")
    if is_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    fault = transformer_engine_fault()
    if not is_cuda():
        _bridge_megatron_to_cpu()
    elif fault:
        _define_router_product()


@functools.cache
def _admit_transformer_engine() -> str | None:
    """Imports Transformer Engine where it can be used; hides it and returns why where not.

    Megatron takes only an ImportError for its absence: one that is half installed raises others and
    would take Megatron down with it. A whole one has optimizers that work on GPUs alone.
    """
    if not is_cuda():
        fault = "it needs an NVIDIA GPU, none is here"
    else:
        try:
            import_module("transformer_engine.pytorch")
            return None
        except Exception as error:  # what is raised depends on what is missing
            missing = getattr(error, "name", None) == "transformer_engine"
            reason = " ".join(str(error).split())
            fault = "it is not installed" if missing else f"it cannot be imported: {reason}"
    for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # makes its import a ModuleNotFoundError
    return fault


def _bridge_megatron_to_cpu() -> None:
    found = version("megatron-core")
    if not found.startswith(MEGATRON_SERIES):
        raise RuntimeError(
            f"megatron-core {found} is installed; the CPU bridge serves {MEGATRON_SERIES}x only"
        )
    _answer_for_cuda()
    compile_, torch.compile = torch.compile, _no_compile
    try:
        # Megatron compiles small fused functions at import; compiling costs more than it saves
        # on a CPU (12 s for the first step), so they run eagerly.
        _repair_megatron()
    finally:
        torch.compile = compile_


def _answer_for_cuda() -> None:
    """Gives the CPU's answer to each `torch.cuda` question Megatron asks."""
    cpu = torch.device("cpu")
    # `with torch.device(...)` looks up the factories once. It has to know torch's own: else it does
    # not reach through ours, and transformers, which asks it, loads models without rotary tables.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    # The optimizers choose a path by the name of a tensor's type and know only CUDA's names.
    type_of = torch.Tensor.type

    def cuda_type(self, *args, **kwargs):
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = cuda_type


def _on_cpu(factory: Callable) -> Callable:
    @functools.wraps(factory)
    def wrapped(*args, device=None, **kwargs):
        if device is not None and torch.device(device).type == "cuda":
            device = "cpu"
        return factory(*args, device=device, **kwargs)

    return wrapped


def _no_compile(model=None, **_):
    return model if model is not None else lambda function: function


def _repair_megatron() -> None:
    """Replaces the two functions that reach past `torch.cuda` into its C module."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("import grpo_mcore before megatron.core on a machine without a GPU")
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # It warns when the CPU's generator moves while it works with the GPU's: here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    _define_router_product()


def _define_router_product() -> None:
    """Names what the router of experts asks for; Megatron does with Transformer Engine only."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
