"""Folder layouts that datasets share: one folder per class, masks paired with images by name."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.files import MASK_FOLDERS, NORMAL_NAMES, letters, list_images, subfolders
from datasets.samples import ANOMALOUS, NORMAL, Sample
from utils.errors import DatasetError

# 000_mask, 000-GT, 000_label_1: what a mask's name adds to its image's, with the number of an instance
MASK_ENDING = re.compile(
    r"[ _.-]+(mask|gt|ground[ _-]?truth|label|seg|segmentation|annotation)s?([ _.-]*(?P<number>\d+))?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Tree:
    """Where a category's images are: {train,test}/<class>/<images>/*.

    test: the folder that stands in the place of test. It may hold the masks' folder, too.
    normal: the class of normal images; every other one is anomalous, and its name is the defect.
    train: the classes that are listed for training. images: folder inside a class folder, if there is one.
    masks: folder of the masks of an anomalous test class, with {defect} for its name; None: there are none.
    need_masks: an anomalous test image without a mask is listed with the path where one is missing.
    group: file name to what must stay on one side of a split (a patient); None: each image for itself.
    """

    normal: str = "good"
    train: tuple[str, ...] = ("good",)
    test: str = "test"
    images: str = ""
    masks: str | None = "ground_truth/{defect}"
    need_masks: bool = True
    group: Callable[[Path], str] | None = None


def categories_with(*inside: str, without: str = "") -> Callable[[Path], list[str]]:
    """A lister of categories: the folders of a root that hold all folders `inside`, and not `without`."""
    return lambda root: [
        p.name for p in subfolders(root) if _holds(p, inside) and not (without and _holds(p, [without]))
    ]


def one_category(name: str, *folders: str) -> Callable[[Path], list[str]]:
    """A lister for a dataset without categories: it has one, `name`, where a root holds all `folders`."""
    return lambda root: [name] if _holds(root, folders) else []


def _holds(path: Path, folders: Iterable[str]) -> bool:
    return all((path / folder).is_dir() for folder in folders)


def lister(tree: Tree, *, whole_root: bool = False) -> Callable[[Path, str], list[Sample]]:
    """`list_tree` of a category's folder, or of the root itself where a dataset has one category."""
    return lambda root, category: list_tree(root if whole_root else root / category, category, tree)


def list_tree(base: Path, category: str, tree: Tree) -> list[Sample]:
    """Samples of the category in the folder `base`: training, then test, by class and name; a DatasetError
    if masks lie among the images, or a test class that counts as anomalous is named like good ones (OK).
    """
    samples: list[Sample] = []
    taken: dict[Path, Path] = {}
    for name in tree.train:
        samples += _list_class(base, category, tree, Masks(None), split="train", name=name)
    mask_root = Path(tree.masks or "").parent
    names = [p.name for p in subfolders(base / tree.test) if p.relative_to(base) != mask_root]
    for name in names:
        folder = base / tree.test / name
        beside = _unmasked(name) in names  # scratch_mask beside scratch
        if beside or letters(name) in MASK_FOLDERS - {"label", "labels"}:  # these may have defects
            raise DatasetError(f"{folder} would count as a kind of defect; masks are in ground_truth/<kind>")
        if name != tree.normal and letters(name) in NORMAL_NAMES:
            good = f"normal test images are in test/{tree.normal} alone"
            raise DatasetError(f"{folder} would count as anomalous, as {good}; rename it")
        place = None if tree.masks is None or name == tree.normal else _mask_folder(base, tree.masks, name)
        masks = Masks(place, needed=tree.need_masks, taken=taken)
        samples += _list_class(base, category, tree, masks, split="test", name=name)
    return samples


def _list_class(
    base: Path, category: str, tree: Tree, masks: "Masks", *, split: str, name: str
) -> list[Sample]:
    label = NORMAL if name == tree.normal else ANOMALOUS
    folder = base / (tree.test if split == "test" else split) / name / tree.images
    samples, images = [], list_images(folder)
    known = {path.stem: path for path in images}
    for path in images:
        if image := known.get(_unmasked(path.stem)):
            why = f"{path} would count as an image, but has the name of a mask of {image.name}"
            raise DatasetError(f"{why}; put masks into ground_truth/<kind>")
        group = tree.group(path) if tree.group else f"{category}/{path.relative_to(base).as_posix()}"
        mask, more = masks.of(path)
        samples.append(Sample(path, label, mask, category, split, name, group, more_masks=more))
    return samples


def _unmasked(name: str) -> str:
    """The name of the image whose mask would be called `name`; empty if no mask is called so."""
    ending = MASK_ENDING.search(name)
    return name[: ending.start()] if ending else ""


def _mask_folder(base: Path, pattern: str, defect: str) -> Path:
    """The folder of a defect's masks: where it should be, else one of another name (masks, Ground_Truth)."""
    expected = base / pattern.format(defect=defect)
    if expected.is_dir() or pattern != Tree.masks:
        return expected
    found = []
    for top in (p for p in subfolders(base) if letters(p.name) in MASK_FOLDERS):
        inside = [p for p in subfolders(top) if p.name.casefold() == defect.casefold()]
        found += inside or ([top] if list_images(top) else [])
    if len(found) > 1:
        raise DatasetError(f"masks of {defect} are in {found[0]} and in {found[1]}; keep them in {expected}")
    return found[0] if found else expected


def by_name(files: Iterable[Path]) -> dict[str, Path]:
    """Files by their names without suffix; a DatasetError if two have the same one."""
    found: dict[str, Path] = {}
    for path in files:
        _check_one([found.setdefault(path.stem, path), path])
    return found


def _check_one(files: Sequence[Path]) -> None:
    first, *others = dict.fromkeys(files)
    if others:
        raise DatasetError(f"{first} and {others[0].name} have the same name; rename or remove one")


class Masks:
    """The masks in a folder, found by an image's name: 000.png, 000_mask.png or 000_GT.bmp for 000.JPG.

    Numbered ones (000_mask_0.png, 000_mask_1.png) are of instances that belong together, and so are those in
    a folder of the image's name (000/0.png, as in MVTec LOCO AD). `taken`: masks to their images, of further
    folders, too. Without a folder no image has a mask.
    """

    def __init__(
        self, folder: Path | None, *, needed: bool = True, taken: dict[Path, Path] | None = None
    ) -> None:
        self.folder, self.needed, self.taken = folder, needed, {} if taken is None else taken
        self.files: dict[str, list[Path]] = {}  # of an image's name, as far as a mask's name tells
        self.numbered: set[Path] = set()
        for path in list_images(folder) if folder else ():
            ending = MASK_ENDING.search(path.stem)
            for name in {path.stem, _unmasked(path.stem) or path.stem}:
                self.files.setdefault(name, []).append(path)
            if ending and ending["number"]:
                self.numbered.add(path)
        for inside in subfolders(folder) if folder else ():
            self.files.setdefault(inside.name, []).extend(list_images(inside))
            self.numbered.update(list_images(inside))

    def of(self, image: Path) -> tuple[Path | None, tuple[Path, ...]]:
        """The first mask of `image`, and further ones; the path where a needed one is missing, or None."""
        expected = [self.folder / f"{image.stem}_mask.png"] if self.folder and self.needed else []
        masks = self.files.get(image.stem) or expected
        if not self.numbered.issuperset(masks) or len({mask.stem for mask in masks}) < len(masks):
            _check_one(masks)
        for mask in masks:
            if self.taken.setdefault(mask, image) != image:
                both = f"{self.taken[mask]} and {image.name} would share the mask {mask}"
                raise DatasetError(f"{both}; give them different names")
        return masks[0] if masks else None, tuple(masks[1:])
