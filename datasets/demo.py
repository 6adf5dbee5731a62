"""A small data set in MVTec's layout, cut from photographs that come inside the scikit-image wheel.

Nothing is downloaded. Train and test crops come from disjoint parts of a photograph.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage
from PIL import Image

from datasets.synthetic import DEFECT_KINDS, MIN_SIDE, add_defect
from utils.cli import new_parser, print_result, run_command, user_path

RECIPE_VERSION = 1  # raise it when a change gives other files
COUNTS = {("train", "good"): 40, ("test", "good"): 12, **{("test", kind): 6 for kind in DEFECT_KINDS}}
TRAIN_SHARE = 0.6  # of the photograph's width, from the left; the rest is for testing
_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Photograph:
    """A bundled photograph and how it is cut, in its pixels."""

    file: str
    foreign: str  # another photograph, for the defects of kind "texture"
    window: int  # side of a crop
    box: tuple[int, int, int, int]  # left, top, right, bottom of the usable part


DEMO_CATEGORIES = {
    "brick": Photograph("brick.png", foreign="gravel.png", window=160, box=(0, 0, 512, 512)),
    # rough: the hard one
    "gravel": Photograph("gravel.png", foreign="brick.png", window=160, box=(0, 0, 512, 512)),
    # in colour and smooth; the box lies inside the round picture
    "retina": Photograph("retina.jpg", foreign="ihc.png", window=300, box=(217, 217, 1193, 1193)),
}


@dataclass(frozen=True)
class Crop:
    """One image of the demo: a turned, perhaps mirrored square of a photograph, in its pixels."""

    split: str
    defect: str
    paths: tuple[str, ...]  # of the image, and of the mask if it has a defect, below the category
    centre: tuple[float, float]
    window: int
    turn: float  # degrees
    mirrored: bool
    gain: float
    seed: tuple[int, ...]  # of the defect


def demo_crops(category: str) -> list[Crop]:
    """All crops of a category, the same at every call."""
    window, (left, top, right, bottom) = DEMO_CATEGORIES[category].window, DEMO_CATEGORIES[category].box
    middle, crops = left + int(TRAIN_SHARE * (right - left)), []
    for part, ((split, defect), count) in enumerate(COUNTS.items()):
        low, high = (left, middle) if split == "train" else (middle, right)
        for index in range(count):
            seed = (RECIPE_VERSION, list(DEMO_CATEGORIES).index(category), part, index)
            rng = np.random.default_rng(seed)
            turn = rng.uniform(-3, 3)
            half = reach(window, turn) + 1
            centre = (rng.uniform(low + half, high - half), rng.uniform(top + half, bottom - half))
            look = (turn, bool(rng.integers(2)), rng.uniform(0.93, 1.07))
            masks = [] if defect == "good" else [f"ground_truth/{defect}/{index:03d}_mask.png"]
            paths = (f"{split}/{defect}/{index:03d}.png", *masks)
            crops.append(Crop(split, defect, paths, centre, window, *look, (*seed, 1)))
    return crops


def reach(window: int, turn: float) -> float:
    """Half the side of the upright square around a turned window, with what the interpolation reads."""
    radians = np.deg2rad(abs(turn))
    return window / 2 * float(np.cos(radians) + np.sin(radians)) + 1


def cut_crop(photograph: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The crop as (size, size, 3) uint8."""
    matrix = cv2.getRotationMatrix2D(crop.centre, crop.turn, 1)
    matrix[:, 2] += np.subtract((crop.window - 1) / 2, crop.centre)
    image = cv2.warpAffine(photograph, matrix, (crop.window, crop.window))
    image = _resize(image, size / crop.window)
    image = image[:, ::-1] if crop.mirrored else image
    return np.clip(np.rint(image * crop.gain), 0, 255).astype(np.uint8)


def read_photograph(name: str) -> np.ndarray:
    """A photograph (H, W, 3) uint8, from the wheel alone: `skimage.data` may download what is missing."""
    with Image.open(_in_wheel(name)) as image:
        return np.asarray(image.convert("RGB"))


def write_demo(root: Path, *, size: int = 256) -> Path:
    """Write the demo under `root`, or keep a finished one of the same recipe; gives back `root`.

    `demo.json` appears last, so an interrupted demo is written anew. Every run gives the same bytes (with the
    same versions of numpy, OpenCV and Pillow). A folder that holds anything else is refused, not changed.
    """
    root = Path(root)
    if size < MIN_SIDE:
        raise ValueError(f"size is {size}; give {MIN_SIDE} or more pixels")
    names = sorted({name for p in DEMO_CATEGORIES.values() for name in (p.file, p.foreign)})
    sha256 = {name: hashlib.sha256(_in_wheel(name).read_bytes()).hexdigest() for name in names}
    recipe = {"recipe": RECIPE_VERSION, "size": size, "photographs": sha256}
    done, begun = root / "demo.json", root / "demo.json.partial"
    if _is_complete(root, recipe):
        _log.debug("demo data is there: %s", root)
        return root
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()) and not done.exists() and not begun.exists():
        raise ValueError(f"{root} holds files that are not the demo's; give a new or an empty folder")
    begun.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    done.unlink(missing_ok=True)
    for category in DEMO_CATEGORIES:
        shutil.rmtree(root / category, ignore_errors=True)
        _write_category(root / category, category, size)
    begun.replace(done)
    _log.info("demo data written: %s", root)
    return root


def _is_complete(root: Path, recipe: dict[str, object]) -> bool:
    try:
        found = json.loads((root / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    crops = ((root / name, crop) for name in DEMO_CATEGORIES for crop in demo_crops(name))
    paths = (folder / path for folder, crop in crops for path in crop.paths)
    return found == recipe and all(path.is_file() for path in paths)


def _write_category(folder: Path, category: str, size: int) -> None:
    photograph = DEMO_CATEGORIES[category]
    pixels, foreign = read_photograph(photograph.file), read_photograph(photograph.foreign)
    foreign = _resize(foreign, size / photograph.window)  # grain as fine as in the crops
    for crop in demo_crops(category):
        image, masks = cut_crop(pixels, crop, size), []
        if crop.defect != "good":
            rng = np.random.default_rng(crop.seed)
            image, mask = add_defect(image, rng, kind=crop.defect, texture=foreign)
            masks = [255 * mask]
        for path, picture in zip(crop.paths, (image, *masks), strict=True):
            _save(folder / path, picture)


def _resize(image: np.ndarray, zoom: float) -> np.ndarray:
    size = [round(n * zoom) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)


def _in_wheel(name: str) -> Path:
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall scikit-image from its wheel, which holds it")
    return path


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=3)


def main(argv: Sequence[str]) -> None:
    """Write the demo from the command line."""
    parser = new_parser("Write the demo data set.")
    parser.add_argument(
        "--output", type=user_path, required=True, metavar="DIR", help="a new or an empty folder"
    )
    root = write_demo(parser.parse_args(argv).output)
    number = len(DEMO_CATEGORIES)
    print_result(f"{root}: {number} categories, {number * sum(COUNTS.values())} images")


if __name__ == "__main__":
    sys.exit(run_command(main))
