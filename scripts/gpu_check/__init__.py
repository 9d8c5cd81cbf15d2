"""Checks that need a real GPU, in a few minutes: `python scripts/gpu_check`, or `--rehearse` without a GPU."""
