"""The demo data set: two kinds of part, rendered by `datasets.demo_scenes`, in MVTec's layout.

Nothing is downloaded. Every image is a new part, so training, held-out and test images are of one kind and
share nothing. The defects are the demo's own: training with synthetic defects (`datasets.synthetic`) draws
none of them. Below `new/` lie a few images of each category that belong to no split, for predict.py.
"""

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.demo_scenes import SCENES, render
from utils.cli import new_parser, print_result, run_command, user_path
from utils.yaml_io import Tree

RECIPE_VERSION = 2  # raise it when a change gives other files
DEMO_CATEGORIES = tuple(SCENES)
FIRST_CATEGORIES = ("brick", "gravel", "retina")  # of recipe 1, which did not name them
SIZE, SMALLEST = 192, 32  # pixels of a side
TRAIN, TEST, TEST_DEFECTS, NEW = 80, 20, 10, 3  # images of a category; TEST_DEFECTS of each kind
_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Picture:
    """One image of the demo. path, mask: below the demo's folder; a good part has no mask."""

    category: str
    kind: str
    seed: tuple[int, ...]
    path: str
    mask: str | None = None


def demo_pictures(category: str) -> list[Picture]:
    """All images of a category, the same at every call."""
    found: list[Picture] = []

    def add(kind: str, path: str, mask: str | None = None) -> None:
        seed = (RECIPE_VERSION, DEMO_CATEGORIES.index(category), len(found))
        found.append(Picture(category, kind, seed, path, mask))

    for split, count in (("train", TRAIN), ("test", TEST)):
        for i in range(count):
            add("good", f"{category}/{split}/good/{i:03d}.png")
    for kind in SCENES[category].kinds:
        for i in range(TEST_DEFECTS):
            mask = f"{category}/ground_truth/{kind}/{i:03d}_mask.png"
            add(kind, f"{category}/test/{kind}/{i:03d}.png", mask)
    for kind in (*["good"] * NEW, *SCENES[category].kinds):
        add(kind, f"new/{category}/{kind}_{len(found):03d}.png")
    return found


def write_demo(root: Path, *, size: int = SIZE) -> Path:
    """Write the demo under `root`, or keep a finished one of the same recipe; gives back `root`.

    `demo.json` appears last, so an interrupted demo is written anew. Every run gives the same bytes (with the
    same versions of numpy, OpenCV and Pillow). A folder that holds anything else is refused, not changed.
    """
    root = Path(root)
    if size < SMALLEST:
        raise ValueError(f"size is {size}; give {SMALLEST} or more pixels")
    pictures = [picture for category in DEMO_CATEGORIES for picture in demo_pictures(category)]
    recipe: Tree = {"recipe": RECIPE_VERSION, "size": size, "categories": list(DEMO_CATEGORIES)}
    done, begun = root / "demo.json", root / "demo.json.partial"
    if _is_complete(root, recipe, pictures):
        _log.debug("demo data is there: %s", root)
        return root
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()) and not done.exists() and not begun.exists():
        raise ValueError(f"{root} holds files that are not the demo's; give a new or an empty folder")
    earlier = {name for path in (done, begun) for name in _recipe(path).get("categories", FIRST_CATEGORIES)}
    for name in sorted({*earlier, *DEMO_CATEGORIES, "new"}):
        shutil.rmtree(root / name, ignore_errors=True)
    begun.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    done.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda picture: _write(root, picture, size), pictures):
            pass
    begun.replace(done)
    _log.info("demo data written: %s", root)
    return root


def _write(root: Path, picture: Picture, size: int) -> None:
    image, mask = render(picture.category, picture.seed, size, picture.kind)
    _save(root / picture.path, image)
    if picture.mask is not None:
        _save(root / picture.mask, 255 * mask)


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=3)


def _recipe(path: Path) -> Tree:
    """What a file of an earlier call says, empty if it is not there or is cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _is_complete(root: Path, recipe: Tree, pictures: list[Picture]) -> bool:
    paths = (path for picture in pictures for path in (picture.path, picture.mask) if path)
    return _recipe(root / "demo.json") == recipe and all((root / path).is_file() for path in paths)


def main(argv: Sequence[str]) -> None:
    """Write the demo from the command line."""
    parser = new_parser("Write the demo data set.")
    text = "a new or an empty folder"
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR", help=text)
    root = write_demo(parser.parse_args(argv).output)
    number = sum(len(demo_pictures(category)) for category in DEMO_CATEGORIES)
    print_result(f"{root}: {len(DEMO_CATEGORIES)} categories, {number} images")


if __name__ == "__main__":
    sys.exit(run_command(main))
