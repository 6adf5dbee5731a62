"""From a model's maps and scores to numbers, tables, figures and a report."""
