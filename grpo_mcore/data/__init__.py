"""Datasets as rows, rows as tokens, and which rows each step uses: pure functions.

Neither torch.distributed nor Megatron nor vLLM."""
