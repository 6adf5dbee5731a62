"""Bring published datasets into the layout that is read here."""
