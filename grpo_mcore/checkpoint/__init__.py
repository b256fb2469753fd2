"""Saves a run, and goes on from it."""

from grpo_mcore import device

device.prepare()  # Megatron is imported below this package.
