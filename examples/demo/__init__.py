"""Adaptive teaching with two tiny models: from random weights to a teacher that helps, in minutes.
Read `problems.py` for the task, `tokenizer.py` for the text, `models.py` for weights and data."""
