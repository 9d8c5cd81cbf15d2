"""The masking engine: selection, masked layers, mask files, streaming application."""
