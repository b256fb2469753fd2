"""Runnable examples; each folder teaches one use of the package."""
