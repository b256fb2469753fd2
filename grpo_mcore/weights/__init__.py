"""The weight sync: its plan, the gather of shards, their transport to the engines and the proof.

Export of a trained model is the same gather, written to disk."""
