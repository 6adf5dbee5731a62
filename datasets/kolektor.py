"""KolektorSDD: surfaces of 50 commutators, photographed in parts, a label mask each; our one-class split."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.layouts import by_name
from datasets.samples import ANOMALOUS, NORMAL, DatasetError, DatasetSpec, Sample, list_images
from datasets.transforms import has_foreground

LAST_TRAINED = 35  # of the commutators kos01 to kos50
COPIES = {"kos26": "kos01", "kos34": "kos27"}  # byte-identical images under another name


def list_kolektor_categories(root: Path) -> list[str]:
    """["kolektor"] where there are commutators with labels."""
    return ["kolektor"] if any(root.glob("kos*/Part*_label.*")) else []


def list_kolektor(root: Path, category: str) -> list[Sample]:
    """Our one-class split: the normal images of kos01 to kos35 are for training, all others for testing.

    An image is anomalous if its label mask is not empty; every mask is opened for that. The group is the
    commutator.

    Raises:
        DatasetError: if an image has no label mask, or a mask cannot be read.
    """
    images, masks = [], []
    for folder in sorted(p for p in root.glob("kos*") if p.is_dir()):
        files = list_images(folder)
        labels = by_name(p for p in files if p.stem.endswith("_label"))
        for path in by_name(p for p in files if p.stem not in labels).values():
            name = f"{path.stem}_label"
            if name not in labels:
                raise DatasetError(f"no mask for {path}; expected {path.with_name(name)}.bmp or .png")
            images.append(path)
            masks.append(labels[name])
    with ThreadPoolExecutor() as pool:
        defective = list(pool.map(has_foreground, masks))
    samples = []
    for path, mask, anomalous in zip(images, masks, defective, strict=True):
        item = path.parent.name
        split = "train" if _number(item) <= LAST_TRAINED and not anomalous else "test"
        group = COPIES.get(item, item)
        kind = (ANOMALOUS, mask) if anomalous else (NORMAL, None)
        samples.append(Sample(path, *kind, category, split, "defect" if anomalous else "good", group))
    return samples


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
    layout="kos01/Part0.jpg with kos01/Part0_label.bmp (or .png), to kos50",
    read_for_labels=("kos*/*_label.*",),
)
