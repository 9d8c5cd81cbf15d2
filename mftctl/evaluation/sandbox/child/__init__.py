"""What runs inside the sandbox: standard library only, read by path, never importing the rest of mftctl."""
