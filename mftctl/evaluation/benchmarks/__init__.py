"""Benchmarks: their problems, prompts and scores."""
