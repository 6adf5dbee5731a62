"""Configuration, run folders, checkpoints, metrics and figures: one subject a file."""
