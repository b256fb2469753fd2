"""The rank grid of each role, its process groups, and the exchange of Python data between roles.

Knows nothing of models."""

from grpo_mcore import device

device.prepare()  # Megatron's process group collection is imported below this package.
