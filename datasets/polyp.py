"""Polyp segmentation: Kvasir-SEG, CVC-ClinicDB and CVC-ColonDB, as scripts/prepare_polyp.py lays them out.

Every image shows a polyp and has a mask. A category is a split: `random`, as the published numbers use, or
`sequence`, which keeps the frames of one video on one side.
"""

from __future__ import annotations

from pathlib import Path

from datasets.layouts import Masks, categories_with
from datasets.samples import ANOMALOUS, Counts, DatasetSpec, Sample, list_images

SPLITS = ("train", "validation", "test")


def list_polyp(root: Path, category: str) -> list[Sample]:
    """<category>/{train,validation,test}/images, with masks of the same name in masks/."""
    samples = []
    for split in SPLITS:
        base = root / category / split
        masks = Masks(base / "masks")
        for path in list_images(base / "images"):
            group = path.relative_to(root).as_posix()
            mask, *more = masks.of(path)
            samples.append(
                Sample(path, ANOMALOUS, mask, category, split, "polyp", group, more_masks=tuple(more))
            )
    return samples


def _spec(name: str, counts: dict[str, Counts]) -> DatasetSpec:
    return DatasetSpec(
        name,
        categories_with("train/images", "test/images"),
        list_polyp,
        counts,
        verified=False,
        verified_total=True,
        layout="<split>/train/images and <split>/test/images, as scripts/prepare_polyp.py writes them,",
        segmentation=True,
        drops_copies=True,  # CVC-ColonDB holds identical frames, and splits by others have them on both sides
    )


# 80 : 10 : 10 of 1000, 612 and 380 images, and whole sequences; the second number of images is of validation
KVASIR = _spec("kvasir", {"random": (0, 0, 100, 800, 100)})
CLINICDB = _spec("clinicdb", {"random": (0, 0, 61, 490, 61), "sequence": (0, 0, 66, 478, 68)})
COLONDB = _spec("colondb", {"random": (0, 0, 38, 304, 38), "sequence": (0, 0, 55, 298, 27)})
