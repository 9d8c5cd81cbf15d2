"""The mask file, format version 1."""
