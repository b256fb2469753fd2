"""Saves a run, and goes on from it."""
