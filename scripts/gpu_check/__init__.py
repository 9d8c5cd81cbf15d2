"""What only a real GPU can show, in a few minutes: `python scripts/gpu_check`, or `--rehearse` without one."""
