"""Prepare a polyp dataset: copy images and masks into splits of 80 : 10 : 10.

python -m scripts.prepare.polyp --dataset clinicdb --source DIR --output DIR

DIR of --source is the unpacked download. The output holds <split>/{train,validation,test}/{images,masks}.
The split `random` draws frames, as published numbers do. `sequence` keeps all frames of a video on one side.
It is written where the videos are known: for the releases of CVC-ClinicDB and CVC-ColonDB, for copies of the
latter in images/ and masks/ whose equal frames have the release's numbers, and for others by a file
sequences.csv with the columns frame and sequence. Byte-identical frames, as CVC-ColonDB holds, stay on
one side in both. The splits are drawn with seed 1 from the names in order, and they are ours: the lists
behind published numbers are not public.
"""

from __future__ import annotations

import random
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets.files import list_images
from datasets.layouts import Masks, by_name
from datasets.samples import ANOMALOUS, Sample
from datasets.splits import first_copies, tied_groups
from scripts.prepare.writer import DatasetError, Item, Source, arguments_parser, prepare
from utils.cli import log, run_command

SHARES = {"train": 0.8, "validation": 0.9, "test": 1.0}  # upper ends
SEQUENCES = "sequences.csv"
CLINICDB_STARTS = (  # first frame of each sequence, as the README of the release lists them
    1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298, 318, 343, 364, 384, 409, 429, 448,
    467, 479, 504, 529, 547, 572, 592,
)  # fmt: skip
COLONDB_STARTS = {  # the same, to the sequence's number
    1: 1, 39: 2, 61: 3, 77: 5, 98: 6, 149: 7, 156: 9, 204: 10, 209: 11, 264: 14, 274: 15, 301: 4, 321: 8,
    341: 12, 361: 13,
}  # fmt: skip
# frames of the release that are the same file: a copy that numbers them so numbers all as the release does
COLONDB_COPIES = (
    (98, 147), (99, 148), (108, 139), (183, 198), (190, 203), (242, 245), (242, 263), (264, 271), (274, 294),
)  # fmt: skip


@dataclass(frozen=True)
class Release:
    """Where a download has its files, and how many images.

    flat: images N.*, masks pN.* (and contours cpN.*) may lie in one folder.
    starts: first frame of each sequence to its number, where the release says so.
    copies: pairs of frames that are the same file.
    """

    images: str
    masks: str
    number: int
    where: str
    flat: bool = False
    starts: dict[int, int] = field(default_factory=dict)
    copies: tuple[tuple[int, int], ...] = ()


RELEASES = {
    "kvasir": Release("images", "masks", 1000, "https://datasets.simula.no/kvasir-seg/"),
    "clinicdb": Release(
        "Original",
        "Ground Truth",
        612,
        "https://polyp.grand-challenge.org/CVCClinicDB/",
        starts={first: number for number, first in enumerate(CLINICDB_STARTS, start=1)},
    ),
    "colondb": Release(
        "images",
        "masks",
        380,
        "http://vi.cvc.uab.es/colon-qa/cvccolondb/ (or as repackaged elsewhere)",
        flat=True,
        starts=COLONDB_STARTS,
        copies=COLONDB_COPIES,
    ),
}


def main(argv: Sequence[str]) -> None:
    """Copy the files, or finish what an earlier call began."""
    parser = arguments_parser(__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, choices=sorted(RELEASES), help="which release")
    args = parser.parse_args(argv)
    release = RELEASES[args.dataset]
    prepare(args.dataset, plan(release, Source(args.source, release.where)), args)


def plan(release: Release, source: Source) -> list[Item]:
    """The files of the prepared dataset.

    Raises:
        DatasetError: if a folder or a mask is missing, or the number of images is another one.
    """
    pairs = read_flat(source.folder) if release.flat else {}
    repackaged = (source.folder / release.images).is_dir()
    deeper = (folder for folder in sorted(source.folder.glob("*/")) if release.flat and read_flat(folder))
    if not pairs and not repackaged and (folder := next(deeper, None)):
        raise DatasetError(f"no image in {source.folder}; did you mean --source {shlex.quote(str(folder))}?")
    if not pairs:
        masks = Masks(source.require(release.masks))
        for path in list_images(source.require(release.images)):
            mask, _ = masks.of(path)
            assert mask is not None  # of a missing one it is the path where it should be
            pairs[path] = mask
    if len(pairs) != release.number:
        raise DatasetError(
            f"found {len(pairs)} images in {source.folder}, expected {release.number}; complete the copy, or "
            f"download it from {release.where}"
        )
    items = split("random", pairs, lambda path: path.stem, whole=False)
    sequences = read_sequences(release, source, list(pairs))
    return items + (split("sequence", pairs, sequences.__getitem__, whole=True) if sequences else [])


def read_flat(folder: Path) -> dict[Path, Path]:
    """Image to mask of a release in one folder: N.* and pN.*; everything else there is left alone."""
    files = by_name(path for path in list_images(folder) if path.stem.removeprefix("p").isdigit())
    images = [path for name, path in files.items() if name.isdigit()]
    return {path: files.get(f"p{path.stem}", path.with_name(f"p{path.name}")) for path in images}


def read_sequences(release: Release, source: Source, images: list[Path]) -> dict[Path, str]:
    """The sequence of each image: by sequences.csv, else as the release numbers its frames, else none."""
    if (source.folder / SEQUENCES).is_file():
        rows = source.table(SEQUENCES, ("frame", "sequence"))
        known = {row["frame"]: row["sequence"] for row in rows}
        missing = [path.name for path in images if path.stem not in known]
        if missing:
            raise DatasetError(f"{SEQUENCES} gives no sequence for {missing[0]}; complete it")
        return {path: known[path.stem] for path in images}
    if not release.starts:
        return {}
    by_number = {p.stem: p for p in images}
    as_released = by_number.keys() == set(_names(release.number))
    if as_released and release.flat and images[0].parent != source.folder:  # repackaged
        pairs = [(by_number[str(a)], by_number[str(b)]) for a, b in release.copies]
        first = first_copies(path for pair in pairs for path in pair)
        as_released = all(first[a] == first[b] for a, b in pairs)
    if not as_released:
        log.warning(
            "no split sequence: the frames are not numbered as in the release; give their sequences in %s",
            source.folder / SEQUENCES,
        )
        return {}
    start_of = {path: max(n for n in release.starts if n <= int(path.stem)) for path in images}
    return {path: str(release.starts[start]) for path, start in start_of.items()}


def _names(number: int) -> list[str]:
    return [str(n) for n in range(1, number + 1)]


def split(name: str, pairs: dict[Path, Path], group: Callable[[Path], str], *, whole: bool) -> list[Item]:
    """Copies of images and masks: groups in random order, largest first, into the first part with room.

    Groups that share byte-identical images count as one.

    Args:
        name: of the split.
        pairs: image to mask.
        group: what must stay on one side, for an image.
        whole: the parts are shares of the groups, else of the images.
    """
    tied = tied_groups([Sample(path, ANOMALOUS, None, "", "", "", group(path)) for path in pairs])
    by_group: dict[str, list[Path]] = {}
    for path in pairs:
        by_group.setdefault(tied[group(path)], []).append(path)
    groups = sorted(by_group)
    random.Random(1).shuffle(groups)  # noqa: S311 (a split, no secret)
    size = dict.fromkeys(groups, 1) if whole else {g: len(by_group[g]) for g in groups}
    ends = [round(end * sum(size.values())) for end in SHARES.values()]
    room = dict(zip(SHARES, (b - a for a, b in zip([0, *ends], ends, strict=False)), strict=True))
    if 0 in room.values():
        raise DatasetError(f"{len(groups)} sequences are too few for three parts of the split {name}")
    items = []
    for chosen in sorted(groups, key=size.__getitem__, reverse=True):
        part = next((part for part, left in room.items() if left >= size[chosen]), "train")
        room[part] -= size[chosen]
        for path in by_group[chosen]:
            mask = pairs[path]
            items.append(Item(path, f"{name}/{part}/images/{path.name}"))
            items.append(Item(mask, f"{name}/{part}/masks/{path.stem}{mask.suffix}"))
    return items


if __name__ == "__main__":
    sys.exit(run_command(main))
