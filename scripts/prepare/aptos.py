"""Prepare APTOS 2019: crop the fundus photographs and split them into train/NORMAL, test/{NORMAL,ABNORMAL}.

python -m scripts.prepare.aptos --source DIR --output DIR

DIR of --source holds the competition's train.csv and train_images/; only these labelled images are used.
The split is that of the public code, as read there: the normal images (grade 0) in the order of train.csv,
shuffled by Python's random with seed 1; the first 1000 are for training, all others for testing. The same
rows in the same order give the same split. We did not have the data, so it is NOT verified that the result
equals the split behind published numbers file by file; with another order of rows it differs.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from scripts.prepare.writer import DatasetError, Item, Source, parse_arguments, prepare
from utils.cli import run_command

WHERE = "https://www.kaggle.com/competitions/aptos2019-blindness-detection/data (needs an account)"
LABELLED = 3662  # rows of train.csv
TRAINED = 1000
SIDE, MARGIN = 512, 5  # pixels: of the result; around the eye, before resizing
DARK = 30  # sum of the three channels up to which a pixel is background


def main(argv: Sequence[str]) -> None:
    """Crop and split, or finish what an earlier call began."""
    args = parse_arguments(__doc__.split("\n")[0], argv)
    prepare("aptos", plan(Source(args.source, WHERE)), args)


def plan(source: Source) -> list[Item]:
    """The files of the prepared dataset.

    Raises:
        DatasetError: if train.csv is missing or has another number of rows.
    """
    rows, images = source.table("train.csv", ("id_code", "diagnosis")), source.require("train_images")
    if len(rows) != LABELLED:
        raise DatasetError(f"train.csv lists {len(rows)} images; that of the competition lists {LABELLED}")
    normal = [row["id_code"] for row in rows if int(row["diagnosis"]) == 0]
    random.Random(1).shuffle(normal)  # noqa: S311 (a split, no secret)
    folders = dict.fromkeys((row["id_code"] for row in rows), "test/ABNORMAL")
    folders |= dict.fromkeys(normal[:TRAINED], "train/NORMAL")
    folders |= dict.fromkeys(normal[TRAINED:], "test/NORMAL")
    return [Item(images / f"{name}.png", f"{place}/{name}.png", crop_file) for name, place in folders.items()]


def crop_file(path: Path) -> bytes:
    """The cropped photograph as PNG.

    Raises:
        DatasetError: if the file is no readable image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DatasetError(f"{path} is no readable image; download it again")
    try:
        return cv2.imencode(".png", fundus_crop(image))[1].tobytes()
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def fundus_crop(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 to (SIDE, SIDE, 3): the square around the centre of the largest bright region.

    What lies outside of the photograph is black.
    """
    bright = (image.sum(axis=2) > DARK).astype(np.uint8)
    _, _, regions, centres = cv2.connectedComponentsWithStats(bright, connectivity=8)
    if len(regions) < 2:
        raise DatasetError("nothing but darkness")
    largest = 1 + int(regions[1:, cv2.CC_STAT_AREA].argmax())
    half = max(regions[largest, cv2.CC_STAT_WIDTH], regions[largest, cv2.CC_STAT_HEIGHT]) / 2
    x, y = centres[largest]
    left, top = int(x - half) - MARGIN, int(y - half) - MARGIN
    right, bottom = int(x + half) + MARGIN, int(y + half) + MARGIN
    height, width = image.shape[:2]
    border = max(0, -left, -top, right - width, bottom - height)
    padded = cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    square = padded[top + border : bottom + border, left + border : right + border]
    return cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)


if __name__ == "__main__":
    sys.exit(run_command(main))
