"""Losses, answers, benchmarks and the statistics that compare them."""
