"""The folder that test.py or predict.py writes: whether it may, and what the files in it are called."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from utils.checkpoint import FILE as CHECKPOINT
from utils.errors import DatasetError, RunError
from utils.files import printable, write_text

LONGEST_NAME = 255  # bytes, of most file systems
SCORES = "scores.csv"
UNFINISHED = "unfinished"  # this file is there while a call writes
WRITTEN = (  # by test.py and predict.py, below --output
    SCORES, "skipped.csv", "metrics.json", "report.html", "heatmaps.png", "clips.png", "heatmaps", "maps",
    "masks", "april-2025", UNFINISHED,
)  # fmt: skip


def names_of(images: Sequence[Path], suffix: str) -> list[Path]:
    """Relative paths of what is written about images, one per image: its own path with another ending.

    If two images differ in their ending alone, or a folder has such a name, every name keeps its ending
    before the new one. A name that is too long for file systems is cut, with a digest at its end. Raises
    DatasetError if a folder of images has that name, too.
    """
    inside = [path.relative_to(path.anchor) for path in images]
    names = [path.with_suffix(suffix) for path in inside]
    folders = {folder for path in inside for folder in path.parents}
    if len(set(names)) < len(names) or not folders.isdisjoint(names):
        names = [path.with_name(f"{path.name}{suffix}") for path in inside]
    if taken := folders.intersection(names):
        raise DatasetError(f"the folder {printable(min(taken))} has the name of a picture; rename the folder")
    return [_short(name, suffix) for name in names]


def _short(path: Path, suffix: str) -> Path:
    name = os.fsencode(path.name)
    if len(name) <= LONGEST_NAME:
        return path
    end = f"-{hashlib.sha256(name).hexdigest()[:8]}{suffix}"
    stem = name[: LONGEST_NAME - len(end)].decode(errors="ignore")  # a character may be cut
    return path.with_name(f"{stem}{end}")


def claim(folder: Path, *, overwrite: bool, images: Sequence[Path] = ()) -> list[Path]:
    """What an earlier call of test.py or predict.py wrote to `folder`, for `begin`; none if nothing did.
    Raises RunError if there is something and it was not asked to replace it, if it is not such a call's, or
    if one of `images` would go with it.
    """
    if (folder / CHECKPOINT).exists():
        raise RunError(f"{printable(folder)} is the folder of a run; choose another --output")
    there = [folder / name for name in WRITTEN if (folder / name).exists()]
    if not there:
        return []
    names, places = ", ".join(path.name for path in there), [path.resolve() for path in there]
    lost = next((p for p in images if any(p.resolve().is_relative_to(place) for place in places)), None)
    if lost is not None:
        raise RunError(
            f"{printable(lost)} is where an output goes, and one of the images; choose another --output"
        )
    stopped = folder / UNFINISHED in there
    if folder / SCORES not in there and not stopped:
        raise RunError(
            f"{printable(folder)} holds {names}, but no {SCORES}: choose another --output, or remove them"
        )
    if not overwrite:
        raise RunError(
            f"{printable(folder)} holds {names} of {'a stopped' if stopped else 'an earlier'} call: choose "
            "another --output, or replace all of it with --overwrite"
        )
    return there


def begin(folder: Path, earlier: Sequence[Path]) -> None:
    """Remove what `claim` found, and mark the folder as unfinished until `finish`."""
    # while one of these is there, --overwrite works again
    for path in sorted(earlier, key=lambda p: p.name in (SCORES, UNFINISHED)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_text(folder / UNFINISHED, "test.py or predict.py writes here, or was stopped; then --overwrite\n")


def finish(folder: Path) -> None:
    """Everything is written."""
    (folder / UNFINISHED).unlink()
