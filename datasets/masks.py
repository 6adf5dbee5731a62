"""Masks, looked at once before training: each anomalous image's must show something where it is used."""

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
        Warnings: images without a mask, masks of more than two grey levels where any value counts, masks
        that cover more than half of the image, masks of which a centre crop leaves nothing, and masks of
        other proportions than their images.

    Raises:
        DatasetError: if masks cannot be read, or show nothing.
    """
    anomalous = list({s.path: s for s in samples if s.label == ANOMALOUS}.values())
    masked = [s for s in anomalous if s.mask_path is not None]
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda sample: _look(sample, decode), masked)
        quiet = None if _log.isEnabledFor(logging.INFO) else True
        looks = list(tqdm(looks, f"checking masks of {name}", len(masked), leave=False, disable=quiet))
    threshold = f"data.mask_threshold={decode.mask_threshold:g}"
    if empty := [look for look in looks if not look.drawn]:
        raise DatasetError(
            f"{len(empty)} of {len(looks)} masks of {name} show nothing at {threshold}, such as "
            f"{printable(empty[0].path)} ({empty[0].highest}); mend them or the threshold, or leave out "
            "their images with --skip-unreadable"
        )
    grey = decode.mask_threshold == 0  # a threshold that was set is for grey levels
    kinds = (
        (
            f"have more than two grey levels; at {threshold} all but 0 count, in JPEG those above half of "
            "the highest",
            [(look, f": {look.levels}") for look in looks if grey and look.levels > 2],
        ),
        (
            "cover more than half of the image",
            [(look, f": {look.drawn:.0%}") for look in looks if look.drawn > 0.5],
        ),
        (
            "have other proportions than their images, and are stretched onto them",
            [(look, f": {look.sizes}") for look in looks if look.sizes],
        ),
        ("have nothing inside of data.center_crop", [(look, "") for look in looks if not look.kept]),
    )
    found = [
        f"{len(those)} masks {what} (such as {printable(those[0][0].path)}{those[0][1]})"
        for what, those in kinds
        if those
    ]
    if masked and len(masked) < len(anomalous):
        first = next(s.path for s in anomalous if s.mask_path is None)
        have = f"{len(masked)} of {len(anomalous)} anomalous images have masks, {printable(first)} has none"
        found.append(f"{have}; without it there are no pixel metrics")
    return [f"{name}: {text}" for text in found]


def _look(sample: Sample, decode: Decode) -> _Look:
    masks = [read_mask(path, decode.mask_threshold) for path in sample.masks]
    drawn = united(sample.masks, [mask.drawn for mask in masks])
    sizes = ""
    try:
        sizes = _sizes(drawn.shape[::-1], upright_size(sample.path))
        for path in sample.masks:
            check_not_across(path, sample.path)
        kept = bool(decode.fit_mask(drawn, sample.path).any())
    except UnreadableImageError:  # of the image: decoding it tells
        kept = True
    top = max(masks, key=lambda mask: mask.values.max())
    of = "" if top.high is None else f" of {top.high:g}"
    return _Look(
        path=sample.masks[0],
        drawn=float(drawn.mean()),
        kept=kept,
        sizes=sizes,
        levels=max(mask.levels for mask in masks),
        highest=f"its highest value is {top.values.max():g}{of}",
    )


def _sizes(mask: tuple[int, int], image: tuple[int, int]) -> str:
    """Both sizes in words if the proportions differ by more than the rounding of a side; else nothing."""
    (width, height), (wide, high) = mask, image
    alike = abs(width * high - wide * height) <= max(wide, high)
    return "" if alike else f"{width} x {height} for {wide} x {high}"


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
