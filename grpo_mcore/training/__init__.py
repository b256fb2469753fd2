"""Megatron's side of a step: micro-batches through the pipeline schedule, the optimizer and its
schedule, the reference model. Knows nothing of rewards."""
