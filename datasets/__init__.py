"""Datasets: each lists its samples; one loader serves them all."""
