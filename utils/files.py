"""Files that are never half-written, and names that fit on one line."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"  # end of the names of temporary files


def printable(text: str | Path) -> str:
    """A name or path on one line, for people: control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def relative_to(path: Path, root: Path | None) -> Path:
    """The path below `root`; a path elsewhere as it is."""
    return path.relative_to(root) if root is not None and path.is_relative_to(root) else path


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, flush: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    write: gets the open file; it may also write to the file of its name.
    flush: wait until the disk has it; not needed for a picture, which can be made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    short = path.name[:40]  # names have a limit
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{short}.", suffix=PARTIAL)
    os.close(handle)
    partial = Path(name)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        partial.chmod(0o644)  # mkstemp makes private files
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno:  # as of a disk that is full
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 in one step; bytes of file names that are no text become escapes."""
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, tree: object) -> None:
    """Write JSON in one step. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(tree, indent=1, allow_nan=False) + "\n")
