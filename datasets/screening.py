"""All files decoded once before a run: unreadable ones are left out, masks that show nothing stop it."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from datasets.images import UnreadableImageError, check_not_across, read_image, upright_size
from datasets.masks import read_mask
from datasets.samples import ANOMALOUS, Sample
from datasets.transforms import Decode, united
from utils.errors import DatasetError
from utils.files import printable, relative_to, write_text

FILE = "skipped.csv"
Skipped = dict[Path, str]  # file to the reason
LEVELS = (
    "have more than two grey levels; at data.mask_threshold=0 all but 0 count, in JPEG above half the highest"
)
WIDE = "cover more than half of the image"
STRETCHED = "have other proportions than their images, and are stretched onto them"
CROPPED = "have nothing inside of data.center_crop"
EMPTY = "show nothing"
_log = logging.getLogger("uninet")


def check_masks(name: str, samples: Sequence[Sample], decode: Decode) -> list[str]:
    """Decode every mask of the anomalous samples as training and testing will, in threads. Raises
    DatasetError if masks cannot be read, or show nothing.

    Returns:
        Warnings: masks with grey levels, that cover half of the image, of other proportions than it, or of
        which a centre crop leaves nothing, and images without a mask.
    """
    anomalous = list({s.path: s for s in samples if s.label == ANOMALOUS}.values())
    masked = [s for s in anomalous if s.masks]
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda sample: _oddities(sample, decode), masked)
        quiet = None if _log.isEnabledFor(logging.INFO) else True
        odd = list(tqdm(looks, f"checking masks of {name}", len(masked), leave=False, disable=quiet))
    warnings, seen = [], list(zip(masked, odd, strict=True))
    for kind in (EMPTY, LEVELS, WIDE, STRETCHED, CROPPED):
        those = [(sample.masks[0], found[kind]) for sample, found in seen if kind in found]
        if not those:
            continue
        (path, detail), count = those[0], len(those)
        if kind == EMPTY:
            raise DatasetError(
                f"{count} of {len(masked)} masks of {name} {EMPTY} at "
                f"data.mask_threshold={decode.mask_threshold:g}, such as {printable(path)} ({detail}); mend "
                "them or the threshold, or leave out their images with --skip-unreadable"
            )
        warnings.append(f"{count} masks {kind} (such as {printable(path)}{detail})")
    if masked and len(masked) < len(anomalous):
        first = next(s.path for s in anomalous if not s.masks)
        have = f"{len(masked)} of {len(anomalous)} anomalous images have masks, {printable(first)} has none"
        warnings.append(f"{have}; without it there are no pixel metrics")
    return [f"{name}: {text}" for text in warnings]


def _oddities(sample: Sample, decode: Decode) -> dict[str, str]:
    """What a user should look at in a sample's masks: its kind to the numbers."""
    masks = [read_mask(path, decode.mask_threshold) for path in sample.masks]
    drawn = united(sample.masks, [mask.drawn for mask in masks])
    levels, odd = max(mask.levels for mask in masks), dict[str, str]()
    if not drawn.any():
        top = max(masks, key=lambda mask: mask.values.max())
        of = "" if top.high is None else f" of {top.high}"
        odd[EMPTY] = f"its highest value is {top.values.max():g}{of}"
    if levels > 2 and decode.mask_threshold == 0:  # a threshold that was set is for grey levels
        odd[LEVELS] = f": {levels}"
    if drawn.mean() > 0.5:
        odd[WIDE] = f": {drawn.mean():.0%}"
    with suppress(UnreadableImageError):  # of the image: decoding it tells
        (height, width), (wide, high) = drawn.shape, upright_size(sample.path)
        if abs(width * high - wide * height) > max(wide, high):  # more than the rounding of a side
            odd[STRETCHED] = f": {width} x {height} for {wide} x {high}"
        for path in sample.masks:
            check_not_across(path, sample.path)
        if not decode.fit_mask(drawn, sample.path).any():
            odd[CROPPED] = ""
    return odd


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
