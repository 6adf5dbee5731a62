"""Folder layouts that datasets share: a folder a class, masks paired with images by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets.files import list_images, subfolders
from datasets.samples import ANOMALOUS, NORMAL, DatasetError, Sample

NORMAL_NAMES = {"good", "ok", "normal", "pass", "passed", "io", "gut", "nodefect", "defectfree"}


@dataclass(frozen=True)
class Tree:
    """Where a category's images are: {train,test}/<class>/<images>/*.

    normal: the class of normal images; every other one is anomalous, and its name is the defect.
    train: the classes that are listed for training; others of train/ are left alone.
    images: folder inside a class folder that holds the images; empty: the class folder itself.
    masks: folder of the masks of an anomalous test class, with {defect} for its name; None: there are none.
    need_masks: an anomalous test image without a mask is listed with the path where one is missing.
    group: file name to what must stay on one side of a split (a patient); None: each image for itself.
    """

    normal: str = "good"
    train: tuple[str, ...] = ("good",)
    images: str = ""
    masks: str | None = "ground_truth/{defect}"
    need_masks: bool = True
    group: Callable[[Path], str] | None = None


def categories_with(*inside: str, without: str = "") -> Callable[[Path], list[str]]:
    """A lister of categories: the folders of a root that hold all folders `inside`, and not `without`."""

    def is_category(path: Path) -> bool:
        holds = all((path / folder).is_dir() for folder in inside)
        return holds and not (without and (path / without).is_dir())

    def list_categories(root: Path) -> list[str]:
        return [p.name for p in subfolders(root) if is_category(p)]

    return list_categories


def one_category(name: str, *folders: str) -> Callable[[Path], list[str]]:
    """A lister for a dataset without categories: it has one, `name`, where a root holds all `folders`."""

    def list_categories(root: Path) -> list[str]:
        return [name] if all((root / folder).is_dir() for folder in folders) else []

    return list_categories


def list_tree(base: Path, category: str, tree: Tree) -> list[Sample]:
    """All samples of the category whose folder is `base`: training, then test, by class and name.

    Raises:
        DatasetError: if a test class that counts as anomalous has a name of good ones (OK, Good, normal).
    """
    samples = []
    for name in tree.train:
        samples += _list_class(base, category, tree, split="train", name=name)
    for folder in subfolders(base / "test"):
        letters = "".join(c for c in folder.name.casefold() if c.isalpha())
        if folder.name != tree.normal and letters in NORMAL_NAMES:
            raise DatasetError(
                f"{folder} would count as anomalous, as normal test images are in test/{tree.normal} alone; "
                "rename it, or give it the name of a defect"
            )
        samples += _list_class(base, category, tree, split="test", name=folder.name)
    return samples


def _list_class(base: Path, category: str, tree: Tree, *, split: str, name: str) -> list[Sample]:
    label = NORMAL if name == tree.normal else ANOMALOUS
    masks = None
    if tree.masks is not None and label == ANOMALOUS and split == "test":
        masks = Masks(base / tree.masks.format(defect=name), needed=tree.need_masks)
    samples = []
    for path in list_images(base / split / name / tree.images):
        mask = masks.of(path) if masks else None
        group = tree.group(path) if tree.group else f"{category}/{path.relative_to(base).as_posix()}"
        samples.append(Sample(path, label, mask, category, split, name, group))
    return samples


def by_name(files: Iterable[Path], ending: str = "") -> dict[str, Path]:
    """Files by their names without suffix and without `ending`.

    Raises:
        DatasetError: if two have the same name, so that an image would have two masks or a mask two images.
    """
    found: dict[str, Path] = {}
    for path in files:
        other = found.setdefault(path.stem.removesuffix(ending), path)
        if other != path:
            raise DatasetError(
                f"{other} and {path.name} have the same name, so which image and mask belong together is not "
                "known; rename or remove one"
            )
    return found


class Masks:
    """The masks in a folder, found by an image's name: 000.png, 000_mask.png or 000.bmp for 000.JPG.

    Raises:
        DatasetError: if two masks belong to one name.
    """

    def __init__(self, folder: Path, *, needed: bool = True) -> None:
        self.folder, self.needed = folder, needed
        self.by_name = by_name(list_images(folder), "_mask")
        self.taken: dict[Path, Path] = {}  # masks to their images

    def of(self, image: Path) -> Path | None:
        """The mask of `image`. If there is none: the path where it is missing, or None if none is needed.

        Raises:
            DatasetError: if another image has it already.
        """
        expected = self.folder / f"{image.stem}_mask.png" if self.needed else None
        mask = self.by_name.get(image.stem, expected)
        if mask is not None and self.taken.setdefault(mask, image) != image:
            raise DatasetError(
                f"{self.taken[mask]} and {image.name} would share the mask {mask}; give them different names"
            )
        return mask
