"""Processes, devices and memory of the machine."""
