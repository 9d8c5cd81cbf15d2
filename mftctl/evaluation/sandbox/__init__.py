"""Runs model-written Python where it can do no harm, and decides whether it passes its test."""
