"""Weight updates: which entries a step changes, which parameters stay frozen."""
