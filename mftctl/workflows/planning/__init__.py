"""Memory, mask sizes and steps of a command, computed before anything is loaded."""
