"""KolektorSDD: surfaces of 50 commutators, photographed in parts, a label mask each; our one-class split."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.files import is_lfs_pointer
from datasets.layouts import by_name
from datasets.samples import ANOMALOUS, NORMAL, DatasetSpec, Sample, list_images
from datasets.transforms import has_foreground
from utils.errors import DatasetError

LAST_TRAINED = 35  # of the commutators kos01 to kos50
COPIES = {"kos26": "kos01", "kos34": "kos27"}  # byte-identical images under another name

_log = logging.getLogger("uninet")


def list_kolektor_categories(root: Path) -> list[str]:
    """["kolektor"] where there are images of commutators with label masks beside them."""
    for label in root.glob("kos*/Part*_label.*"):
        if any(label.parent.glob(f"{label.stem.removesuffix('_label')}.*")):
            return ["kolektor"]
    return []


def list_kolektor(root: Path, category: str) -> list[Sample]:
    """Our one-class split: the normal images of kos01 to kos35 are for training, all others for testing.

    An image is anomalous if its label mask is not empty; every mask is opened for that. It is listed as
    anomalous, too, if that mask is missing or cannot be read: it must not be trained on as normal. The group
    is the commutator.

    Raises:
        DatasetError: if a folder is no commutator's.
    """
    images, masks = [], []
    for folder in sorted(p for p in root.glob("kos*") if p.is_dir()):
        files = list_images(folder)
        labels = by_name(p for p in files if p.stem.endswith("_label"))
        for path in by_name(p for p in files if p.stem not in labels).values():
            name = f"{path.stem}_label"
            images.append(path)
            masks.append(labels.get(name, path.with_name(f"{name}.bmp")))
    with ThreadPoolExecutor() as pool:
        defective = list(pool.map(_is_defective, masks))
    samples = []
    for path, mask, anomalous in zip(images, masks, defective, strict=True):
        item = path.parent.name
        split = "train" if _number(item) <= LAST_TRAINED and not anomalous else "test"
        group = COPIES.get(item, item)
        kind = (ANOMALOUS, mask) if anomalous else (NORMAL, None)
        samples.append(Sample(path, *kind, category, split, "defect" if anomalous else "good", group))
    return samples


def _is_defective(mask: Path) -> bool:
    try:
        return has_foreground(mask)
    except DatasetError as error:
        if mask.exists() and not is_lfs_pointer(mask):  # what `collect` says of others is clear enough
            _log.warning("%s", error)
        return True


def _number(commutator: str) -> int:
    digits = commutator.removeprefix("kos")
    if not digits.isdigit():
        raise DatasetError(f"folder {commutator} is no commutator; they are kos01 to kos50")
    return int(digits)


KOLEKTOR = DatasetSpec(
    "kolektor",
    list_kolektor_categories,
    list_kolektor,
    {"kolektor": (244, 103, 52)},
    layout="kos01 to kos50, with Part*.jpg and Part*_label.bmp (or .png)",
    read_for_labels=("kos*/*_label.*",),
)
