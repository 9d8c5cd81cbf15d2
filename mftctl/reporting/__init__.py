"""Tables made from run folders."""
