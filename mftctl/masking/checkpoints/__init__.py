"""The checkpoints that a mask fits: found, loaded, checked and written."""
