"""Reads data files of all supported formats into token ids with masked labels."""
