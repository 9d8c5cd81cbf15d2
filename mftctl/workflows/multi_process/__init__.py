"""One command run by several processes."""
