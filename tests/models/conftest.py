"""Readies the process before a test here imports Megatron."""

from grpo_mcore import device

device.prepare()
