"""Estimates a command's memory, mask sizes, steps and training data before anything is loaded."""
