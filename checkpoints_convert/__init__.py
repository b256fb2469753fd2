"""Hugging Face <-> Megatron checkpoint tools: one process, no GPU, one tensor at a time.

python -m checkpoints_convert.{hf_to_megatron,megatron_to_hf,compare}; docs/conversion.md"""
