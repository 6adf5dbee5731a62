"""Models that stand beside UniNet."""
