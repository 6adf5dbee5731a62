"""Leave out what cannot be read before anything starts, and say what was left out (--skip-unreadable)."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.images import UnreadableImageError, check_not_across, read_image, read_mask
from datasets.samples import Sample
from utils.errors import DatasetError
from utils.files import printable, relative_to
from utils.runs import write_text

FILE = "skipped.csv"
Skipped = dict[Path, str]  # file to the reason
_log = logging.getLogger("uninet")


def readable(samples: Sequence[Sample], mask_threshold: float = 0) -> tuple[list[Sample], Skipped]:
    """The samples whose image and masks can be decoded, in order, and the files of the others.

    A mask that shows nothing at `mask_threshold` is one of those, too. Every file is decoded in full, in
    threads; each file left out is logged with its reason.
    """
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda sample: _problem(sample, mask_threshold), samples))
    kept = [s for s, problem in zip(samples, problems, strict=True) if problem is None]
    skipped = dict(problem for problem in problems if problem is not None)
    for path, reason in skipped.items():
        _log.warning("left out: %s: %s", printable(path), reason)
    return kept, skipped


def write_skipped(folder: Path, skipped: Mapping[Path, str], root: Path | None) -> None:
    """Write <folder>/skipped.csv (path below `root`, reason) if anything was left out; else remove one."""
    if not skipped:
        (folder / FILE).unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    rows = ((relative_to(path, root).as_posix(), reason) for path, reason in skipped.items())
    table.writerows([("path", "reason"), *rows])
    write_text(folder / FILE, text.getvalue())


def _problem(sample: Sample, mask_threshold: float) -> tuple[Path, str] | None:
    path, drawn = sample.path, not sample.masks
    try:
        for path in (sample.path, *sample.earlier):
            read_image(path)
        for path in sample.masks:
            drawn |= read_mask(path, mask_threshold).drawn.any()
            check_not_across(path, sample.path)
    except UnreadableImageError as error:
        return path, error.reason
    except DatasetError as error:
        return path, str(error)
    return None if drawn else (path, f"the mask shows nothing at data.mask_threshold={mask_threshold:g}")
