"""Locating, checking, loading and writing the checkpoints that masks apply to."""
