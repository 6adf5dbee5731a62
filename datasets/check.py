"""Check a dataset on disk before training: python -m datasets.check --dataset NAME --data-root DIR.

Every category is listed, counted against what is published, and searched for images that are both in the
training and in the test set; one image of each folder is decoded, and every mask of an anomalous image, which
must show something. Exit code 1 if a verified count differs or a category is damaged.
"""

import csv
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datasets.images import UnreadableImageError, check_not_across, read_image, read_mask, upright_size
from datasets.registry import SPECS, find_root
from datasets.samples import (
    ANOMALOUS,
    NORMAL,
    Counts,
    DatasetSpec,
    Sample,
    check_files,
    check_splits,
    count,
    counts_are_wrong,
    unused_beside,
    unused_samples,
)
from datasets.splits import check_disjoint, check_labels, without_copies
from datasets.transforms import Decode, united
from utils.cli import new_parser, print_result, run_command
from utils.errors import DatasetError
from utils.files import printable, relative_to, write_text
from utils.layers import config_file, load_config

HEADER = ("category", "found", "published", "status")
COUNTS = "counts: normal training / normal test / anomalous test (/ anomalous training (/ validation)) images"
SKIPPED_CSV = "skipped.csv"
Skipped = dict[Path, str]  # file to the reason
LEVELS = (
    "have more than two grey levels; at data.mask_threshold=0 all but 0 count, in JPEG above half the highest"
)
WIDE = "cover more than half of the image"
STRETCHED = "have other proportions than their images, and are stretched onto them"
CROPPED = "have nothing inside of data.center_crop"
EMPTY = "show nothing"
_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Row:
    """One category. problem: what is wrong. note: what a reader should know. unused: files of no sample."""

    category: str
    found: Counts
    published: Counts
    status: str  # ok | differs | unverified: ... | nothing published | missing | damaged
    problem: str = ""
    note: str = ""
    unused: str = ""


def main(argv: Sequence[str]) -> None:
    """Print one line per category, then what is wrong; a DatasetError if a category is not as it must be."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, choices=sorted(SPECS), help="its name")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: none)")
    args = parser.parse_args(argv)
    spec = SPECS[args.dataset]
    root = find_root(spec, args.data_root)
    here = spec.list_categories(root)
    rows = [check_category(spec, root, name) for name in here]  # a wrong one stops none of the others
    rows += [Row(name, (), spec.counts[name], "missing") for name in spec.counts if name not in here]
    print_result(f"{table(rows)}\n{COUNTS}")
    for row in rows:
        for text in filter(None, (row.problem, row.note, row.unused and f"not used: {row.unused}")):
            print_result(f"{row.category}: {text}")
    if beside := str(unused_beside(spec, root, here)):
        print_result(f"beside the categories: not used: {beside}")
    if wrong := [row.category for row in rows if row.status in ("differs", "damaged")]:
        names = ", ".join(wrong)
        raise DatasetError(f"{len(wrong)} of {len(rows)} categories are damaged or not as published: {names}")


def check_category(spec: DatasetSpec, root: Path, name: str) -> Row:
    """List one category and compare it with what is published."""
    published, found, unused = spec.counts.get(name, Counts()), Counts(), ""
    data = load_config(config_file(spec.name), {"data.name": spec.name}).data
    decode = Decode(data.image_size, center_crop=data.center_crop, mask_threshold=data.mask_threshold)
    try:
        samples = spec.list_samples(root, name)
        found, unused = count(samples), str(unused_samples(spec, root, name, samples))
        train = [s for s in samples if s.split == "train" and (s.label == NORMAL or spec.segmentation)]
        test = [s for s in samples if s.split == "test"]
        check_files(spec, root, samples)
        check_splits(spec, name, samples)
        check_labels(spec, name, samples)
        check_disjoint(without_copies(train, test) if spec.drops_copies else train, test)
        for sample in {s.path.parent: s for s in reversed(samples)}.values():  # one of each folder
            read_image(sample.path)
        notes = check_masks(spec.name, samples, decode)
    except DatasetError as error:
        return Row(name, found, published, "damaged", str(error), unused=unused)
    groups = {s.group for s in train}
    if known := sum(s.group in groups for s in test):
        notes = [f"{known} of {len(test)} test images are of an item or patient that is trained on", *notes]
    status = "ok" if found == published else "differs"
    if not (spec.verified or counts_are_wrong(spec, found, published)):
        status = f"unverified: {status}"
    status = status if published else "nothing published"
    return Row(name, found, published, status, note="; ".join(notes), unused=unused)


def table(rows: Sequence[Row]) -> str:
    """Counts found and published, one line per category."""
    lines = [HEADER]
    for row in rows:
        found, published = ("/".join(map(str, numbers)) or "-" for numbers in (row.found, row.published))
        lines.append((row.category, found, published, row.status))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def check_masks(name: str, samples: Sequence[Sample], decode: Decode) -> list[str]:
    """Decode every mask of the anomalous samples as training and testing will, in threads; return warnings:
    masks with grey levels, that cover half of the image, of other proportions than it, or of which a
    centre crop leaves nothing, and images without a mask. DatasetError if masks cannot be read or are empty.
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
            where = f"{name} {EMPTY} at data.mask_threshold={decode.mask_threshold:g}"
            example = f"such as {printable(path)} ({detail})"
            way_out = "mend them or the threshold, or leave out their images with --skip-unreadable"
            raise DatasetError(f"{count} of {len(masked)} masks of {where}, {example}; {way_out}")
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
        (folder / SKIPPED_CSV).unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = ((relative_to(path, root).as_posix(), reason) for path, reason in skipped.items())
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rows])
    write_text(folder / SKIPPED_CSV, text.getvalue())


if __name__ == "__main__":
    sys.exit(run_command(main))
