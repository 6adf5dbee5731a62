"""Medical datasets: APTOS, OCT2017 and ISIC2018 with labels only; polyps with masks."""

from pathlib import Path

from datasets.files import list_images
from datasets.layouts import Masks, Tree, categories_with, lister, one_category
from datasets.samples import ANOMALOUS, Counts, DatasetSpec, Sample


def _patient(path: Path) -> str:
    """Of files named CLASS-PATIENT-NUMBER, whose images are one group."""
    parts = path.stem.split("-")
    return parts[1] if len(parts) > 2 else path.stem


def _prepared(name: str, counts: Counts) -> DatasetSpec:
    """A dataset that a script lays out; the sum of its images is verified, how they split is not."""
    return DatasetSpec(
        name,
        one_category(name, "train/NORMAL", "test/NORMAL", "test/ABNORMAL"),
        lister(Tree(normal="NORMAL", train=("NORMAL",), masks=None), whole_root=True),
        {name: counts},
        verified=False,
        verified_total=True,
        layout=f"train/NORMAL and test/{{NORMAL,ABNORMAL}}, as scripts/prepare/{name}.py writes them,",
    )


APTOS = _prepared("aptos", (1000, 805, 1857))  # 3662 labelled images, 1805 of them of grade 0
ISIC2018 = _prepared("isic2018", (6705, 123, 70))
# Patients were in both the training and the test set of an earlier release, so copies of images may be, too.
OCT2017 = DatasetSpec(
    "oct2017",
    one_category("oct2017", "train/NORMAL", "test/NORMAL", "test/CNV", "test/DME", "test/DRUSEN"),
    lister(Tree(normal="NORMAL", train=("NORMAL",), masks=None, group=_patient), whole_root=True),
    {"oct2017": (26315, 250, 750)},
    layout="train/NORMAL and test/{NORMAL,CNV,DME,DRUSEN}",
    drops_copies=True,
)


def list_polyp(root: Path, category: str) -> list[Sample]:
    """<category>/{train,validation,test}/images, with masks of the same name in masks/.

    Every image shows a polyp. A category is a split: `random`, as the published numbers use, or `sequence`,
    which keeps the frames of one video on one side.
    """
    samples = []
    for split in ("train", "validation", "test"):
        base = root / category / split
        masks = Masks(base / "masks")
        for path in list_images(base / "images"):
            group, (mask, more) = path.relative_to(root).as_posix(), masks.of(path)
            samples.append(Sample(path, ANOMALOUS, mask, category, split, "polyp", group, more_masks=more))
    return samples


def _polyps(name: str, counts: dict[str, Counts]) -> DatasetSpec:
    return DatasetSpec(
        name,
        categories_with("train/images", "test/images"),
        list_polyp,
        counts,
        verified=False,
        verified_total=True,
        layout="<split>/train/images and <split>/test/images, as scripts/prepare/polyp.py writes them,",
        segmentation=True,
        drops_copies=True,  # CVC-ColonDB holds identical frames, and splits by others have them on both sides
    )


# 80 : 10 : 10 of 1000, 612 and 380 images, and whole sequences; the last number is of validation
KVASIR = _polyps("kvasir", {"random": (0, 0, 100, 800, 100)})
CLINICDB = _polyps("clinicdb", {"random": (0, 0, 61, 490, 61), "sequence": (0, 0, 66, 478, 68)})
COLONDB = _polyps("colondb", {"random": (0, 0, 38, 304, 38), "sequence": (0, 0, 55, 298, 27)})
