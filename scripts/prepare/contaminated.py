"""Write one category of MVTec AD's layout with a share of defects among its training normals.

python -m scripts.prepare.contaminated --source DIR/screw --output DIR2/screw-10 --rate 0.1

The training set keeps its size: defects of the test set take the place of normals. Defects for the highest
rate (MOST) leave the test set at every rate, so all rates share one test set, and a lower rate's defects are
among those of a higher one. Train with --config configs/folder.yaml --data-root DIR2 --category screw-10.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets.registry import SPECS, collect
from datasets.samples import ANOMALOUS, Sample
from scripts.prepare.writer import Item, Source, arguments_parser, prepare
from utils.cli import run_command
from utils.errors import ConfigError, DatasetError

WHERE = "the dataset's page (docs/DATASETS.md)"
MOST = 0.2  # of the training images; a higher rate leaves too few defects for a test
SEED = 0  # of the draw; the same for all rates


def main(argv: Sequence[str]) -> None:
    """Copy the images, or finish what an earlier call began."""
    parser = arguments_parser(__doc__.split("\n")[0])
    text = f"share of the training images that show a defect, 0 to {MOST}"
    parser.add_argument("--rate", type=float, required=True, metavar="R", help=text)
    args = parser.parse_args(argv)
    items = plan(Source(args.source, WHERE), args.rate)
    expected = {args.output / item.target for item in items}
    other = [path for path in sorted(args.output.rglob("*")) if path.is_file() and path not in expected]
    if other:
        raise DatasetError(f"{other[0]} is not of --rate {args.rate}; choose an empty --output for each rate")
    prepare("folder", items, args)


def plan(source: Source, rate: float) -> list[Item]:
    """The files of the category with `rate` (0 to MOST) of its training images replaced by defects.

    Raises:
        ConfigError: if the rate is out of range.
        DatasetError: as `collect`; if no defect would be left in the test set.
    """
    if not 0 <= rate <= MOST:
        raise ConfigError(f"--rate is {rate}; choose a value between 0 and {MOST}")
    source.require("train/good")
    samples = collect(SPECS["folder"], source.folder, "all")
    train = [s for s in samples if s.split == "train"]
    defects = [s for s in samples if s.split == "test" and s.label == ANOMALOUS]
    taken = round(MOST * len(train))
    if len(defects) <= taken:
        found = f"{source.folder} has {len(defects)} defects and {len(train)} training images"
        raise DatasetError(f"{found}; more than {taken} defects are needed")
    rng, moved = np.random.default_rng(SEED), round(rate * len(train))
    left_out = set(rng.permutation(len(train))[:moved].tolist())
    order = rng.permutation(len(defects))
    kept = set(order[taken:].tolist())
    items = [_copy(s, "train/good") for i, s in enumerate(train) if i not in left_out]
    items += [_copy(defects[i], "train/good", f"{defects[i].defect}_") for i in order[:moved]]
    for sample in (s for s in samples if s.split == "test" and s.label != ANOMALOUS):
        items.append(_copy(sample, f"test/{sample.defect}"))
    for sample in (s for i, s in enumerate(defects) if i in kept):
        items.append(_copy(sample, f"test/{sample.defect}"))
        # under the image's name: where each image has a folder of masks, these have names of their own
        stem, masks = f"ground_truth/{sample.defect}/{sample.path.stem}_mask", sample.masks
        for i, mask in enumerate(masks):
            items.append(Item(mask, (f"{stem}_{i}" if len(masks) > 1 else stem) + mask.suffix))
    return items


def _copy(sample: Sample, folder: str, prefix: str = "") -> Item:
    return Item(sample.path, str(Path(folder, prefix + sample.path.name)))


if __name__ == "__main__":
    sys.exit(run_command(main))
