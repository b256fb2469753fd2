"""Two-pass adaptive teaching: templates, extraction, what a student is asked, evaluation.

Knows nothing of Megatron."""
