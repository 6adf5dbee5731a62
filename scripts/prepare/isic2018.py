"""Prepare ISIC2018 Task 3: nevi of the training set to train on, the validation set to test on.

python -m scripts.prepare.isic2018 --source DIR --output DIR

DIR of --source holds the four unpacked archives ISIC2018_Task3_{Training,Validation}_{Input,GroundTruth}.
Images are copied as they are, to train/NORMAL, test/NORMAL (nevi) and test/ABNORMAL (the six other classes).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from scripts.prepare.writer import DatasetError, Item, Source, parse_arguments, prepare
from utils.cli import run_command

WHERE = "https://challenge.isic-archive.com/data/#2018 (Task 3)"
TRAINED, TESTED = 6705, 193  # nevi of the training set, all images of the validation set


def main(argv: Sequence[str]) -> None:
    """Copy the images, or finish what an earlier call began."""
    args = parse_arguments(__doc__.split("\n")[0], argv)
    prepare("isic2018", plan(Source(args.source, WHERE)), args)


def plan(source: Source) -> list[Item]:
    """The files of the prepared dataset.

    Raises:
        DatasetError: if a table is missing or has other numbers of images.
    """
    train = [item for item in part(source, "Training") if item.target.startswith("train/NORMAL")]
    test = part(source, "Validation")
    if (len(train), len(test)) != (TRAINED, TESTED):
        raise DatasetError(
            f"found {len(train)} nevi to train on and {len(test)} images to test on; published are {TRAINED} "
            f"and {TESTED}: use the files of Task 3"
        )
    return train + test


def part(source: Source, name: str) -> list[Item]:
    """The images of "Training" or "Validation"."""
    stem = f"ISIC2018_Task3_{name}"
    rows = source.table(f"{stem}_GroundTruth/{stem}_GroundTruth.csv", ("image", "NV"))
    images, split = source.require(f"{stem}_Input"), "train" if name == "Training" else "test"
    items = []
    for row in rows:
        kind = "NORMAL" if float(row["NV"]) == 1 else "ABNORMAL"
        items.append(Item(images / f"{row['image']}.jpg", f"{split}/{kind}/{row['image']}.jpg"))
    return items


if __name__ == "__main__":
    sys.exit(run_command(main))
