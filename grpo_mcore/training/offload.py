"""Device memory lent to others."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from grpo_mcore import device


def offload(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Moves what `tensors` hold from the device to host memory. Whole storages move, so views of
    the same memory, such as a distributed optimizer's of the parameters, stay views of it.

    Returns:
        What moves it all back.
    """
    kind = device.torch_device().type
    storages = {}
    for tensor in tensors:
        if tensor.device.type == kind and tensor.numel():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    copies = []
    for storage in storages.values():
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=device.is_cuda())
        copy.untyped_storage().copy_(storage)
        storage.resize_(0)
        copies.append(copy)

    def bring_back() -> None:
        for storage, copy in zip(storages.values(), copies, strict=True):
            storage.resize_(copy.nbytes)
            storage.copy_(copy.untyped_storage())

    return bring_back
