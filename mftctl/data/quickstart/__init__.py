"""The built-in model and its data."""
