"""Figures of the paper, and two that need no run."""
