"""From files of any known format to token ids with masked labels."""
