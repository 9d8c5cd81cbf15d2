"""Delta files: what fine-tuning changed in a checkpoint, format version 3 of the mask file."""
