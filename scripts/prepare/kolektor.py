"""Write KolektorSDD in MVTec AD's layout, as one category beside others (one model over several datasets).

python -m scripts.prepare.kolektor --source DIR --output DIR/kolektor

Training on KolektorSDD alone needs no preparation. The split is the one-class split of configs/kolektor.yaml,
without the training images of kos26 and kos34: they are copies of others, and this layout cannot say so.
Put other categories (links will do) beside the output and train with
--config configs/folder.yaml --data-root DIR --setting multi-class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from datasets.industrial import COPIES, KOLEKTOR
from datasets.registry import collect
from scripts.prepare.writer import Item, Source, parse_arguments, prepare
from utils.cli import run_command

WHERE = "https://www.vicos.si/resources/kolektorsdd/"


def main(argv: Sequence[str]) -> None:
    """Copy the images, or finish what an earlier call began."""
    args = parse_arguments(__doc__.split("\n")[0], argv)
    prepare("folder", plan(Source(args.source, WHERE)), args)


def plan(source: Source) -> list[Item]:
    """The files of the prepared category, named <commutator>_<part>.

    Raises:
        DatasetError: as `collect`.
    """
    source.require("kos01")
    items = []
    for sample in collect(KOLEKTOR, source.folder, "all"):
        if sample.split == "train" and sample.path.parent.name in COPIES:
            continue
        name = f"{sample.path.parent.name}_{sample.path.stem}"
        items.append(Item(sample.path, f"{sample.split}/{sample.defect}/{name}{sample.path.suffix}"))
        if sample.mask_path is not None:
            suffix = sample.mask_path.suffix
            items.append(Item(sample.mask_path, f"ground_truth/{sample.defect}/{name}_mask{suffix}"))
    return items


if __name__ == "__main__":
    sys.exit(run_command(main))
