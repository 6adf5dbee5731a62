"""Crops of a photograph of gravel for test_bits.py, as the demo of v0.1.0 made them, byte for byte.

The photograph comes inside the scikit-image wheel. Its left 60 % is for training, the rest for testing.
"""

from pathlib import Path

import cv2
import numpy as np
import skimage
from PIL import Image

from datasets.synthetic import DEFECT_KINDS, add_defect

COUNTS = {("train", "good"): 40, ("test", "good"): 12, **{("test", kind): 6 for kind in DEFECT_KINDS}}
WINDOW, SIDE, MIDDLE, SIZE = (
    160,
    512,
    307,
    256,
)  # of a crop, of the photograph, where testing begins, of a file


def read_photograph(name):
    """A photograph (H, W, 3) uint8 of the wheel."""
    with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        return np.asarray(image.convert("RGB"))


def write_gravel(root):
    """Write the category `gravel` in MVTec's layout; gives back `root`."""
    gravel, brick = read_photograph("gravel.png"), read_photograph("brick.png")
    foreign = _resize(brick, SIZE / WINDOW)
    for part, ((split, defect), count) in enumerate(COUNTS.items()):
        low, high = (0, MIDDLE) if split == "train" else (MIDDLE, SIDE)
        for index in range(count):
            seed = (1, 1, part, index)
            rng = np.random.default_rng(seed)
            image = _crop(gravel, rng, low, high)
            if defect != "good":
                image, mask = add_defect(
                    image, np.random.default_rng((*seed, 1)), kind=defect, texture=foreign
                )
                _save(root / f"gravel/ground_truth/{defect}/{index:03d}_mask.png", 255 * mask)
            _save(root / f"gravel/{split}/{defect}/{index:03d}.png", image)
    return root


def _crop(photograph, rng, low, high):
    """A turned, perhaps mirrored square between the columns `low` and `high`."""
    turn = rng.uniform(-3, 3)
    radians = np.deg2rad(abs(turn))
    half = WINDOW / 2 * float(np.cos(radians) + np.sin(radians)) + 2
    centre = (rng.uniform(low + half, high - half), rng.uniform(half, SIDE - half))
    mirrored, gain = bool(rng.integers(2)), rng.uniform(0.93, 1.07)
    matrix = cv2.getRotationMatrix2D(centre, turn, 1)
    matrix[:, 2] += np.subtract((WINDOW - 1) / 2, centre)
    image = _resize(cv2.warpAffine(photograph, matrix, (WINDOW, WINDOW)), SIZE / WINDOW)
    image = image[:, ::-1] if mirrored else image
    return np.clip(np.rint(image * gain), 0, 255).astype(np.uint8)


def _resize(image, zoom):
    size = [round(n * zoom) for n in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_CUBIC)


def _save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=3)
