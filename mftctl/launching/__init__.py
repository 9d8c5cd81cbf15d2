"""Work that several processes do together: how many, how they are started, watched and heard."""
