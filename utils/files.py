"""Paths as people read them."""

from __future__ import annotations

from pathlib import Path


def relative_to(path: Path, root: Path | None) -> Path:
    """The path below `root`; a path elsewhere as it is."""
    return path.relative_to(root) if root is not None and path.is_relative_to(root) else path


def printable(text: str | Path) -> str:
    """A name or path on one line, for people: control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
