"""Industrial datasets: MVTec AD, AD 2, LOCO, 3D-AD (colour only), BTAD, VisA, VAD, KolektorSDD, own images.

Counts are train normal / test normal / test anomalous (/ train anomalous), as published.
"""

import csv
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets.files import is_lfs_pointer, list_images
from datasets.images import read_mask
from datasets.layouts import Tree, by_name, categories_with, list_tree, lister, one_category
from datasets.samples import ANOMALOUS, NORMAL, DatasetSpec, Sample
from utils.errors import DatasetError

_log = logging.getLogger("uninet")

MVTEC_COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109),
    "carpet": (280, 28, 89), "grid": (264, 21, 57), "hazelnut": (391, 40, 70),
    "leather": (245, 32, 92), "metal_nut": (220, 22, 93), "pill": (267, 26, 141),
    "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip
list_categories = categories_with("train/good", without="train/good/rgb")  # that is MVTec 3D-AD's
# train/good, test/<type>, ground_truth/<type>/<name>_mask.png
list_mvtec = lister(Tree())
MVTEC = DatasetSpec("mvtec", list_categories, list_mvtec, MVTEC_COUNTS)


# The sums of a class's test images (70, 230, 441) are verified, how they split is not.
BTAD_COUNTS = {"01": (400, 21, 49), "02": (399, 30, 200), "03": (1000, 400, 41)}
BTAD = DatasetSpec(
    "btad",
    categories_with("train/ok"),
    lister(Tree(normal="ok", train=("ok",))),
    BTAD_COUNTS,
    verified=False,
    layout="<category>/train/ok",
)


VISA_COUNTS = {
    "candle": (900, 100, 100), "capsules": (542, 60, 100), "cashew": (450, 50, 100),
    "chewinggum": (453, 50, 100), "fryum": (450, 50, 100), "macaroni1": (900, 100, 100),
    "macaroni2": (900, 100, 100), "pcb1": (904, 100, 100), "pcb2": (901, 100, 100),
    "pcb3": (905, 101, 100), "pcb4": (904, 101, 100), "pipe_fryum": (450, 50, 100),
}  # fmt: skip
VISA_SPLIT = "split_csv/1cls.csv"  # of the release


def list_visa_categories(root: Path) -> list[str]:
    """Categories of the release, or of the prepared layout."""
    release = (root / VISA_SPLIT).is_file()
    return (categories_with("Data/Images/Normal") if release else list_categories)(root)


def list_visa(root: Path, category: str) -> list[Sample]:
    """Samples of the release (by its one-class split file), or of the prepared layout (MVTec AD's). Raises
    DatasetError if the split file lacks a column or a mask, or names a file outside of the root.
    """
    split_file, columns = root / VISA_SPLIT, {"object", "split", "label", "image", "mask"}
    if not split_file.is_file():
        return list_mvtec(root, category)
    with split_file.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not columns <= rows[0].keys():
        raise DatasetError(f"{split_file} must have the columns {', '.join(sorted(columns))}")
    samples = []
    for row in rows:
        path, normal = root / row["image"], row["label"] == "normal"
        if any(Path(p).is_absolute() or ".." in Path(p).parts for p in (row["image"], row["mask"] or "")):
            raise DatasetError(f"{split_file} names {row['image']}, which is outside of {root}")
        if not normal and not row["mask"]:
            raise DatasetError(f"{split_file} gives no mask for {row['image']}")
        if row["object"] == category:
            label, mask, defect = (NORMAL, None, "good") if normal else (ANOMALOUS, root / row["mask"], "bad")
            samples.append(Sample(path, label, mask, category, row["split"], defect, row["image"]))
    return sorted(samples, key=lambda s: (s.split != "train", s.defect, s.path))


VISA = DatasetSpec(
    "visa",
    list_visa_categories,
    list_visa,
    VISA_COUNTS,
    layout="split_csv/1cls.csv and <category>/Data/Images/Normal (the release), or <category>/train/good "
    "(prepared)",
    read_for_labels=("split_csv/*.csv",),
)


# Recalled, not verified by category; they sum up to the published 2656 + 1197.
MVTEC3D_COUNTS = {
    "bagel": (244, 22, 88), "cable_gland": (223, 21, 87), "carrot": (286, 27, 132),
    "cookie": (210, 28, 103), "dowel": (288, 26, 104), "foam": (236, 20, 80), "peach": (361, 26, 106),
    "potato": (300, 22, 92), "rope": (298, 32, 69), "tire": (210, 25, 87),
}  # fmt: skip


MVTEC3D = DatasetSpec(
    "mvtec3d",
    categories_with("train/good/rgb"),
    lister(Tree(images="rgb", masks="test/{defect}/gt")),  # validation/ and the point clouds are left alone
    MVTEC3D_COUNTS,
    verified=False,
    layout="<category>/train/good/rgb",
)


AD2_COUNTS = {
    "can": (412, 72, 90), "fabric": (387, 66, 90), "fruit_jelly": (263, 20, 60), "rice": (313, 42, 90),
    "sheet_metal": (137, 24, 90), "vial": (291, 35, 105), "wallplugs": (293, 60, 90),
    "walnuts": (432, 60, 90),
}  # fmt: skip


def _scene(path: Path) -> str:
    """One object under several lights: can/test_public/bad/000 of 000_regular.png and 000_shift_1.png."""
    return "/".join((*path.parts[-4:-1], path.stem.partition("_")[0]))


# validation/ and the private test sets are scripts/submit_mvtec_ad2.py's
AD2 = DatasetSpec(
    "mvtec_ad2",
    categories_with("train/good", "test_public"),
    lister(Tree(test="test_public", masks="test_public/ground_truth/{defect}", group=_scene)),
    AD2_COUNTS,
    layout="<category>/train/good and <category>/test_public (the private test sets have no labels)",
)


# Of the archive; its authors print 354 training images of splicing_connectors.
LOCO_COUNTS = {
    "breakfast_box": (351, 102, 173), "juice_bottle": (335, 94, 236), "pushpins": (372, 138, 172),
    "screw_bag": (360, 122, 219), "splicing_connectors": (360, 119, 193),
}  # fmt: skip
# ground_truth/<type>/<name>/*.png are the regions of an image; validation/ is left alone
LOCO = DatasetSpec(
    "mvtec_loco",
    categories_with("train/good", "test/logical_anomalies"),
    list_mvtec,
    LOCO_COUNTS,
    layout="<category>/train/good and <category>/test/logical_anomalies",
    read_for_labels=("defects_config.json",),
)


# Rare defects are in the test set alone.
VAD = DatasetSpec(
    "vad",
    one_category("vad", "train/good", "train/bad", "test/good", "test/bad"),
    lister(Tree(train=("good", "bad"), masks=None), whole_root=True),
    {"vad": (2000, 1000, 1000, 1000)},
    layout="train/{good,bad} and test/{good,bad}",
)


LAST_TRAINED = 35  # of the commutators kos01 to kos50
COPIES = {"kos26": "kos01", "kos34": "kos27"}  # byte-identical images under another name


def list_kolektor_categories(root: Path) -> list[str]:
    """["kolektor"] where there are images of commutators with label masks beside them."""
    for label in root.glob("kos*/Part*_label.*"):
        if any(label.parent.glob(f"{label.stem.removesuffix('_label')}.*")):
            return ["kolektor"]
    return []


def list_kolektor(root: Path, category: str) -> list[Sample]:
    """Our one-class split: the normal images of kos01 to kos35 are for training, all others for testing.

    An image is anomalous unless its label mask can be read and is empty. The group is the commutator.
    """
    pairs = []
    for folder in sorted(p for p in root.glob("kos*") if p.is_dir()):
        if not folder.name.removeprefix("kos").isdigit():
            raise DatasetError(f"folder {folder.name} is no commutator; they are kos01 to kos50")
        files = list_images(folder)
        labels = by_name(p for p in files if p.stem.endswith("_label"))
        for path in by_name(p for p in files if p.stem not in labels).values():
            name = f"{path.stem}_label"
            pairs.append((path, labels.get(name, path.with_name(f"{name}.bmp"))))
    with ThreadPoolExecutor() as pool:
        defective = list(pool.map(_is_defective, [mask for _, mask in pairs]))
    samples = []
    for (path, mask), anomalous in zip(pairs, defective, strict=True):
        item = path.parent.name
        trained = int(item.removeprefix("kos")) <= LAST_TRAINED and not anomalous
        split, group = "train" if trained else "test", COPIES.get(item, item)
        label, shown, defect = (ANOMALOUS, mask, "defect") if anomalous else (NORMAL, None, "good")
        samples.append(Sample(path, label, shown, category, split, defect, group))
    return samples


def _is_defective(mask: Path) -> bool:
    try:
        return bool(read_mask(mask).drawn.any())
    except DatasetError as error:
        if mask.exists() and not is_lfs_pointer(mask):  # what `collect` says of others is clear enough
            _log.warning("%s", error)
        return True  # it must not be trained on as normal


KOLEKTOR = DatasetSpec(
    "kolektor",
    list_kolektor_categories,
    list_kolektor,
    {"kolektor": (244, 103, 52)},
    layout="kos01 to kos50, with Part*.jpg and Part*_label.bmp (or .png)",
    read_for_labels=("kos*/*_label.*",),
)


def list_folder(root: Path, category: str) -> list[Sample]:
    """As MVTec AD. Test images and masks are optional (pixel metrics need all masks)."""
    base = root if (root / "train/good").is_dir() else root / category
    return list_tree(base, category, Tree(need_masks=False))


FOLDER = DatasetSpec(
    "folder",
    # the categories below a folder, or its own name if it holds train/good itself
    lambda root: [root.resolve().name] if (root / "train/good").is_dir() else list_categories(root),
    list_folder,
    counts={},
    layout="train/good or <category>/train/good",
    needs_test=False,
)
_READ = "demo.json", "new/*/*.png"  # of no split, and so on purpose
DEMO = DatasetSpec("demo", list_categories, list_mvtec, counts={}, read_for_labels=_READ)
