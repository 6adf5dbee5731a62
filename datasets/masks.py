"""Masks, looked at once before training: each anomalous image's must show something where it is used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets.images import UnreadableImageError, check_not_across, read_mask, upright_size
from datasets.samples import ANOMALOUS, Sample
from datasets.transforms import Decode, united
from utils.errors import DatasetError
from utils.files import printable

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
