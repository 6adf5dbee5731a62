"""The losses of the paper, one file a loss."""
