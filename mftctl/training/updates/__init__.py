"""Weight updates: the entries that a step changes and the parameters that stay frozen."""
