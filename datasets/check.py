"""Check a dataset on disk before training: python -m datasets.check --dataset NAME --data-root DIR.

Every category is listed, counted against what is published, and searched for images that are both in the
training and in the test set; one image of each folder is decoded, and every mask of an anomalous image, which
must show something. Exit code 1 if a verified count differs or a category is damaged.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.images import read_image
from datasets.registry import SPECS, find_root
from datasets.samples import (
    NORMAL,
    Counts,
    DatasetSpec,
    check_files,
    check_splits,
    count,
    counts_are_wrong,
    unused_beside,
    unused_samples,
)
from datasets.screening import check_masks
from datasets.splits import check_disjoint, check_labels, without_copies
from datasets.transforms import Decode
from utils.cli import new_parser, print_result, run_command
from utils.errors import DatasetError
from utils.layers import config_file, load_config

HEADER = ("category", "found", "published", "status")
COUNTS = "counts: normal training / normal test / anomalous test (/ anomalous training (/ validation)) images"


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
    """Print one line per category, then what is wrong. Raises DatasetError if a category is damaged or
    differs from verified counts.
    """
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
        raise DatasetError(
            f"{len(wrong)} of {len(rows)} categories are damaged or not as published: {', '.join(wrong)}"
        )


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
        known_items = f"{known} of {len(test)} test images are of an item or patient that is trained on"
        notes = [known_items, *notes]
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


if __name__ == "__main__":
    sys.exit(run_command(main))
