"""The random generators of a process, as JSON."""

import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from grpo_mcore import device


def random_state() -> dict:
    """The states of Python's, NumPy's, torch's and Megatron's generators."""
    numpy = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state()) if device.is_cuda() else None,
        "megatron": {k: _to_hex(v) for k, v in get_cuda_rng_tracker().get_states().items()},
    }


def restore_random_state(state: dict) -> None:
    """Sets what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    key = np.array(inner["key"], dtype=np.uint32)
    np.random.set_state(state["numpy"] | {"state": inner | {"key": key}})
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))
    get_cuda_rng_tracker().set_states({k: _from_hex(v) for k, v in state["megatron"].items()})


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
