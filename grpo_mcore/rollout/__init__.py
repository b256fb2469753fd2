"""vLLM engines in child processes of the ranks whose devices they share, and the pool of a role's
engines. Knows nothing of Megatron."""
