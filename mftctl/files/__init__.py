"""Atomic writes, temporary folders, locks, and ownership of result folders."""
