"""vLLM engines in processes of their own, started by the ranks whose devices they share, and the
pool of a role's engines. Knows nothing of Megatron."""
