"""The work of each command, independent of the terminal."""
