"""Tables of the paper, and those of our own measurements."""
