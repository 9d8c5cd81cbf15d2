"""Multi-process work: the number of processes, starting and monitoring them, and their messages."""
