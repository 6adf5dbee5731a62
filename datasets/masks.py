"""Files looked at before training: each mask must show something; unreadable files can be left out."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets.images import UnreadableImageError, check_not_across, read_image, read_mask, upright_size
from datasets.samples import ANOMALOUS, Sample
from datasets.transforms import Decode, united
from utils.errors import DatasetError
from utils.files import printable, relative_to, write_text

_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class _Look:
    """What a sample's masks show. drawn: share of the image; kept: any pixel is left at the working size.

    sizes: "30 x 20 for 20 x 20" where the mask has other proportions than its image, else empty.
    """

    path: Path
    drawn: float
    kept: bool
    sizes: str
    levels: int
    highest: str


def check_masks(name: str, samples: Sequence[Sample], decode: Decode) -> list[str]:
    """Decode every mask of the anomalous samples as training and testing will, in threads.

    Returns:
        Warnings: masks with grey levels, that cover half of the image, of other proportions than it, or of
        which a centre crop leaves nothing, and images without a mask.

    Raises:
        DatasetError: if masks cannot be read, or show nothing.
    """
    anomalous = list({s.path: s for s in samples if s.label == ANOMALOUS}.values())
    masked = [s for s in anomalous if s.mask_path is not None]
    with ThreadPoolExecutor() as pool:
        quiet = None if _log.isEnabledFor(logging.INFO) else True
        done = pool.map(lambda sample: _look(sample, decode), masked)
        looks = list(tqdm(done, f"checking masks of {name}", len(masked), leave=False, disable=quiet))
    threshold = f"data.mask_threshold={decode.mask_threshold:g}"
    if empty := [look for look in looks if not look.drawn]:
        raise DatasetError(
            f"{len(empty)} of {len(looks)} masks of {name} show nothing at {threshold}, such as "
            f"{printable(empty[0].path)} ({empty[0].highest}); mend them or the threshold, or leave out "
            "their images with --skip-unreadable"
        )
    grey = decode.mask_threshold == 0  # a threshold that was set is for grey levels
    levels = f"have more than two grey levels; at {threshold} all but 0 count, in JPEG above half the highest"
    proportions = "have other proportions than their images, and are stretched onto them"
    kinds = {
        levels: [(look.path, f": {look.levels}") for look in looks if grey and look.levels > 2],
        "cover more than half of the image": [(o.path, f": {o.drawn:.0%}") for o in looks if o.drawn > 0.5],
        proportions: [(look.path, f": {look.sizes}") for look in looks if look.sizes],
        "have nothing inside of data.center_crop": [(look.path, "") for look in looks if not look.kept],
    }
    warnings = [
        f"{name}: {len(those)} masks {what} (such as {printable(those[0][0])}{those[0][1]})"
        for what, those in kinds.items()
        if those
    ]
    if masked and len(masked) < len(anomalous):
        first = printable(next(s.path for s in anomalous if s.mask_path is None))
        have = f"{name}: {len(masked)} of {len(anomalous)} anomalous images have masks, {first} has none"
        warnings.append(f"{have}; without it there are no pixel metrics")
    return warnings


def _look(sample: Sample, decode: Decode) -> _Look:
    masks = [read_mask(path, decode.mask_threshold) for path in sample.masks]
    drawn = united(sample.masks, [mask.drawn for mask in masks])
    sizes, kept = "", True
    try:
        (height, width), (wide, high) = drawn.shape, upright_size(sample.path)
        if abs(width * high - wide * height) > max(wide, high):  # more than the rounding of a side
            sizes = f"{width} x {height} for {wide} x {high}"
        for path in sample.masks:
            check_not_across(path, sample.path)
        kept = bool(decode.fit_mask(drawn, sample.path).any())
    except UnreadableImageError:  # of the image: decoding it tells
        pass
    top = max(masks, key=lambda mask: mask.values.max())
    of = "" if top.high is None else f" of {top.high:g}"
    highest, levels = f"its highest value is {top.values.max():g}{of}", max(mask.levels for mask in masks)
    return _Look(sample.masks[0], float(drawn.mean()), kept, sizes, levels, highest)


# --- --skip-unreadable --------------------------------------------------------------------------------------

FILE = "skipped.csv"
Skipped = dict[Path, str]  # file to the reason


def filter_unreadable(samples: Sequence[Sample], mask_threshold: float = 0) -> tuple[list[Sample], Skipped]:
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


def _problem(sample: Sample, mask_threshold: float) -> tuple[Path, str] | None:
    path, drawn = sample.path, not sample.masks
    try:
        for path in (sample.path, *sample.earlier):
            read_image(path)
        for path in sample.masks:
            drawn |= bool(read_mask(path, mask_threshold).drawn.any())
            check_not_across(path, sample.path)
    except DatasetError as error:
        return path, error.reason if isinstance(error, UnreadableImageError) else str(error)
    return None if drawn else (path, f"the mask shows nothing at data.mask_threshold={mask_threshold:g}")


def write_skipped(folder: Path, skipped: Mapping[Path, str], root: Path | None) -> None:
    """Write <folder>/skipped.csv (path below `root`, reason) if anything was left out; else remove one."""
    if not skipped:
        (folder / FILE).unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = ((relative_to(path, root).as_posix(), reason) for path, reason in skipped.items())
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rows])
    write_text(folder / FILE, text.getvalue())
