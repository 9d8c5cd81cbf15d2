"""Which weights a training step changes, and how."""
