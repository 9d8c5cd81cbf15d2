"""Files that appear whole or not at all, and the folders that mftctl made."""
