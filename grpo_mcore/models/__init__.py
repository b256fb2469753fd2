"""From a Hugging Face configuration to a Megatron model; log-probabilities over its sharded
vocabulary. One file per model family, with the weight rules that loading, export and sync share."""
