"""Models and optimizer states spread over several processes."""
