"""The devices that memory is planned for."""

from dataclasses import dataclass

from grpo_mcore import device
from grpo_mcore.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """
    Attributes:
        memory: bytes of one device; None: all processes share a host's.
        is_gpu: engines then share the device with the ranks that own them.
    """

    name: str
    memory: int | None
    is_gpu: bool


DEVICES = {
    found.name: found
    for found in (
        Device("cpu", None, False),
        Device("a100_80gb", 79 * GIB, True),
        Device("h100_80gb", 79 * GIB, True),
        Device("h200_141gb", 139 * GIB, True),
    )
}
"""By the name of the option in examples/configs/hardware; memory as CUDA reports it."""


def this_device() -> Device:
    """That of this process."""
    return Device("this machine's", device.total_memory(), device.is_cuda())


def find_device(key: str, text: str) -> Device:
    """The device that `text`, a name or a number of GiB, stands for.

    Raises:
        ConfigError: naming `key`, for anything else.
    """
    if text in DEVICES:
        return DEVICES[text]
    try:
        gib = float(text)
    except ValueError:
        gib = 0
    if not 0 < gib < float("inf"):
        raise ConfigError(
            f"{key}={text}: give the GiB of a GPU, or one of {', '.join(sorted(DEVICES))}"
        )
    return Device(f"{gib:g} GiB", int(gib * GIB), True)
