"""Everything that is checked before models load. Every rank checks the same and comes to the same
result, so no rank waits for one that stopped. Knows nothing of what a step does."""
