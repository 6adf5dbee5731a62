"""Errors that a user can do something about; the commands print their message as one line."""

from __future__ import annotations


class DatasetError(ValueError):
    """The data on disk is not what the dataset needs; the message says what was expected and what to do."""
