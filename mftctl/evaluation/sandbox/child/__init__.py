"""Code that runs inside the sandbox: standard library only, loaded by path, without the rest of mftctl."""
