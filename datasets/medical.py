"""Medical datasets with labels an image, no masks: APTOS, OCT2017 and ISIC2018. They have one category each.

Counts are train normal / test normal / test anomalous.
"""

from __future__ import annotations

from pathlib import Path

from datasets.layouts import Tree, list_tree, one_category
from datasets.samples import DatasetSpec, Sample


def list_medical(root: Path, category: str) -> list[Sample]:
    """train/NORMAL, test/NORMAL, and test/<any other name> anomalous."""
    return list_tree(root, category, Tree(normal="NORMAL", train=("NORMAL",), masks=None))


def list_oct(root: Path, category: str) -> list[Sample]:
    """As `list_medical`; files are named CLASS-PATIENT-NUMBER, and a patient's images are one group.

    The diseased training images are left alone.
    """
    return list_tree(root, category, Tree(normal="NORMAL", train=("NORMAL",), masks=None, group=_patient))


def _patient(path: Path) -> str:
    parts = path.stem.split("-")
    return parts[1] if len(parts) > 2 else path.stem


# 3662 labelled images, 1805 of them of grade 0 and 1000 of those for training
APTOS = DatasetSpec(
    "aptos",
    one_category("aptos", "train/NORMAL", "test/NORMAL", "test/ABNORMAL"),
    list_medical,
    {"aptos": (1000, 805, 1857)},
    verified=False,
    verified_total=True,
    has_masks=False,
    layout="train/NORMAL and test/{NORMAL,ABNORMAL}, as scripts/prepare_aptos.py writes them,",
)
# Patients were in both the training and the test set of an earlier release, so copies of images may be, too.
OCT2017 = DatasetSpec(
    "oct2017",
    one_category("oct2017", "train/NORMAL", "test/NORMAL", "test/CNV", "test/DME", "test/DRUSEN"),
    list_oct,
    {"oct2017": (26315, 250, 750)},
    has_masks=False,
    layout="train/NORMAL and test/{NORMAL,CNV,DME,DRUSEN}",
    drops_copies=True,
)
# The sum of the test images (193) is verified, how they split is not.
ISIC2018 = DatasetSpec(
    "isic2018",
    one_category("isic2018", "train/NORMAL", "test/NORMAL", "test/ABNORMAL"),
    list_medical,
    {"isic2018": (6705, 123, 70)},
    verified=False,
    verified_total=True,
    has_masks=False,
    layout="train/NORMAL and test/{NORMAL,ABNORMAL}, as scripts/prepare_isic2018.py writes them,",
)
