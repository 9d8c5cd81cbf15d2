"""Sources of outputs: transformers, vLLM, and files."""
