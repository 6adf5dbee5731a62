"""Industrial datasets in MVTec AD's layout: train/good, test/<type>, ground_truth/<type>/<name>_mask.png."""

from __future__ import annotations

from pathlib import Path

from datasets.samples import ANOMALOUS, NORMAL, DatasetError, DatasetSpec, Sample, list_images

# train normal / test normal / test anomalous, as published
MVTEC_COUNTS = {
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "tile": (230, 33, 84),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "wood": (247, 19, 60),
    "zipper": (240, 32, 119),
}


def list_categories(root: Path) -> list[str]:
    """Folders of `root` that hold train/good."""
    return sorted(p.name for p in root.iterdir() if (p / "train" / "good").is_dir()) if root.is_dir() else []


def list_mvtec(root: Path, category: str, *, need_masks: bool = True) -> list[Sample]:
    """All samples of a category; masks are paired by name, whatever their order or suffix.

    Raises:
        DatasetError: if an anomalous test image has no mask, while `need_masks`.
    """
    base = root / category

    def sample(path: Path, split: str, defect: str, mask: Path | None) -> Sample:
        label = NORMAL if defect == "good" else ANOMALOUS
        return Sample(path, label, mask, category, split, defect, group=str(path.relative_to(root)))

    samples = [sample(p, "train", "good", None) for p in list_images(base / "train" / "good")]
    folders = sorted(p for p in (base / "test").iterdir() if p.is_dir()) if (base / "test").is_dir() else []
    for folder in folders:
        defect = folder.name
        masks = {p.stem.removesuffix("_mask"): p for p in list_images(base / "ground_truth" / defect)}
        for path in list_images(folder):
            mask = masks.get(path.stem) if defect != "good" else None
            if mask is None and defect != "good" and need_masks:
                where = base / "ground_truth" / defect
                raise DatasetError(
                    f"no mask for {path}; expected {where / path.stem}_mask.png (or the same name)"
                )
            samples.append(sample(path, "test", defect, mask))
    return samples


MVTEC = DatasetSpec("mvtec", list_categories, list_mvtec, MVTEC_COUNTS)
