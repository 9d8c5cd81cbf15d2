"""Runs model-written Python in a sandbox and decides whether it passes its test."""
