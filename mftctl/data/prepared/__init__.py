"""Training data prepared once: read, tokenised, and kept in Arrow files that every command maps."""
