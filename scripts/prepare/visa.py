"""Prepare VisA: bring the release into MVTec AD's layout by its one-class split, masks as 0 and 255.

python -m scripts.prepare.visa --source DIR --output DIR

This program reads the release as it is, too; other programs need the prepared layout. DIR of --source holds
split_csv/1cls.csv and one folder per category. Images are copied as they are, with their names, to
<category>/train/good and <category>/test/{good,bad}, masks to <category>/ground_truth/bad.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2

from datasets.images import read_mask
from datasets.industrial import VISA_SPLIT
from scripts.prepare.writer import SPECS, Item, Source, collect, parse_arguments, prepare
from utils.cli import run_command

WHERE = "https://github.com/amazon-science/spot-diff (VisA_20220922.tar)"


def main(argv: Sequence[str]) -> None:
    """Copy images and masks, or finish what an earlier call began."""
    args = parse_arguments(__doc__.split("\n")[0], argv)
    prepare("visa", plan(Source(args.source, WHERE)), args)


def plan(source: Source) -> list[Item]:
    """The files of the prepared dataset."""
    source.require(VISA_SPLIT)
    items = []
    for s in collect(SPECS["visa"], source.folder, "all"):
        items.append(Item(s.path, f"{s.category}/{s.split}/{s.defect}/{s.path.name}"))
        if s.mask_path is not None:
            target = f"{s.category}/ground_truth/{s.defect}/{s.path.stem}.png"
            items.append(Item(s.mask_path, target, black_and_white))
    return items


def black_and_white(path: Path) -> bytes:
    """The mask as PNG with 255 wherever it is not zero."""
    return cv2.imencode(".png", 255 * read_mask(path).drawn.astype("uint8"))[1].tobytes()


if __name__ == "__main__":
    sys.exit(run_command(main))
