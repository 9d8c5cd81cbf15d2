"""Losses, generated answers, benchmarks and statistics for comparing them."""
