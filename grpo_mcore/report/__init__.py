"""What a run tells: phase times, metrics.jsonl, one readable line a step, curves."""
