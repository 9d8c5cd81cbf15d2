"""The training loop, its trainers and update rules."""
