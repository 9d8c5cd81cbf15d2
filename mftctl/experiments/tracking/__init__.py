"""Sending the metrics of a run to experiment trackers, which never affects the run."""
