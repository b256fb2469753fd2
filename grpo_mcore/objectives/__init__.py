"""Losses and advantages: pure functions of tensors and settings.

Neither torch.distributed nor Megatron nor vLLM."""
