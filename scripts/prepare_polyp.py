"""Prepare a polyp dataset: copy images and masks into splits of 80 : 10 : 10.

python scripts/prepare_polyp.py --dataset clinicdb --source DIR --output DIR

DIR of --source is the unpacked download. The output holds <split>/{train,validation,test}/{images,masks}. The
split `random` draws frames, as published numbers do; `sequence` keeps all frames of a video on one side and
is written where the videos are known (CVC-ClinicDB: sequences.csv with the columns frame and sequence, as the
README of the release lists them). Both are drawn with seed 1 from the names in order, and they are ours: the
lists behind the published numbers are not public.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preparation import DatasetError, Item, Source, log, prepare

from datasets.layouts import Masks
from datasets.samples import list_images
from utils.cli import new_parser, run_command

SHARES = {"train": 0.8, "validation": 0.9, "test": 1.0}  # upper ends
SEQUENCES = "sequences.csv"


@dataclass(frozen=True)
class Release:
    """Where a download has its files, and how many. `certain`: another number is an error, else a warning."""

    images: str
    masks: str
    number: int
    certain: bool
    where: str


RELEASES = {
    "kvasir": Release("images", "masks", 1000, True, "https://datasets.simula.no/kvasir-seg/"),
    "clinicdb": Release(
        "Original", "Ground Truth", 612, True, "https://polyp.grand-challenge.org/CVCClinicDB/"
    ),
    "colondb": Release(  # 379 as the paper prints it, usually given as 380
        "images",
        "masks",
        380,
        False,
        "http://vi.cvc.uab.es/colon-qa/cvccolondb/ (or as repackaged elsewhere)",
    ),
}


def main(argv: Sequence[str]) -> None:
    """Copy the files, or finish what an earlier call began."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, choices=sorted(RELEASES))
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the originals, unpacked")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the prepared dataset")
    args = parser.parse_args(argv)
    release = RELEASES[args.dataset]
    prepare(args.dataset, plan(release, Source(args.source, release.where)), args)


def plan(release: Release, source: Source) -> list[Item]:
    """The files of the prepared dataset.

    Raises:
        DatasetError: if a folder or a mask is missing, or the number of images is another one.
    """
    images = list_images(source.require(release.images))
    masks = Masks(source.require(release.masks))
    if len(images) != release.number:
        problem = f"found {len(images)} images in {source.folder / release.images}, expected {release.number}"
        if release.certain:
            raise DatasetError(f"{problem}; complete the copy, or download it from {release.where}")
        log.warning("%s (a number that we could not verify)", problem)
    items = split("random", images, masks, lambda path: path.stem)
    if (source.folder / SEQUENCES).is_file():
        rows = source.table(SEQUENCES, ("frame", "sequence"))
        known = {row["frame"]: row["sequence"] for row in rows}
        missing = [path.name for path in images if path.stem not in known]
        if missing:
            raise DatasetError(f"{SEQUENCES} gives no sequence for {missing[0]}; complete it")
        items += split("sequence", images, masks, lambda path: known[path.stem])
    return items


def split(name: str, images: list[Path], masks: Masks, group: Callable[[Path], str]) -> list[Item]:
    """Copies of images and masks: groups in random order, each part gets its share of the groups."""
    by_group: dict[str, list[Path]] = {}
    for path in images:
        by_group.setdefault(group(path), []).append(path)
    groups = sorted(by_group)
    random.Random(1).shuffle(groups)  # noqa: S311 (a split, no secret)
    items = []
    for i, chosen in enumerate(groups):
        part = next(part for part, end in SHARES.items() if i < round(end * len(groups)))
        for path in by_group[chosen]:
            mask = masks.of(path)
            items.append(Item(path, f"{name}/{part}/images/{path.name}"))
            items.append(Item(mask, f"{name}/{part}/masks/{path.stem}{mask.suffix}"))
    return items


if __name__ == "__main__":
    sys.exit(run_command(main))
