"""What a command will need, computed before anything is loaded: memory, mask sizes, steps and what is trained on."""
