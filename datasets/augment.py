"""Changes of training batches, image and mask alike: flips, rotation, several sizes (Sec. 8.2), tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config_rules import scaled_side

Batch = dict[str, Tensor]
CATEGORY_FLIP_CHANCE = 0.3  # of the public code of UniAS


def flip(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each image, and its mask, mirrored left to right and upside down, each with p = 0.5."""
    flipped = {key: batch[key].clone() for key in ("image", "mask") if key in batch}
    for axis in (-1, -2):
        chosen = torch.from_numpy(rng.random(len(batch["image"])) < 0.5)
        for values in flipped.values():
            values[chosen] = values[chosen].flip(axis)
    return batch | flipped


def flip_rotate(batch: Batch, rng: np.random.Generator) -> Batch:
    """Each image flipped along either axis (p = 0.5 each) and rotated by up to 90 degrees both ways.

    Beyond the border image and mask go on mirrored. Masks stay binary.
    """
    images = batch["image"]
    count, height, width = len(images), *images.shape[2:]
    angle = torch.tensor(rng.uniform(-math.pi / 2, math.pi / 2, count))
    flip_x, flip_y = (torch.tensor(rng.choice([-1.0, 1.0], count)) for _ in range(2))
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    # rotation in pixels, written in coordinates that run from -1 to 1 along both sides
    matrix = torch.zeros(count, 2, 3, dtype=torch.float64)
    matrix[:, 0, 0], matrix[:, 0, 1] = flip_x * cos, -flip_x * sin * aspect
    matrix[:, 1, 0], matrix[:, 1, 1] = flip_y * sin / aspect, flip_y * cos
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    warped = dict(batch)
    warped["image"] = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if "mask" in batch:
        mask = F.grid_sample(
            batch["mask"].to(images), grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        warped["mask"] = mask.to(batch["mask"].dtype)
    return warped


AUGMENTATIONS = {"flip": flip, "flip-rotate": flip_rotate}  # data.augment


def by_category(batch: Batch, operations: Sequence[Sequence[str]], rng: np.random.Generator) -> Batch:
    """Each image, and its mask, changed by its own operations, in this order.

    hflip mirrors left to right and vflip upside down, both with p = 0.3; rot90 turns a square image by 0, 90,
    180 or 270 degrees, equally likely.
    """
    changed = {key: batch[key].clone() for key in ("image", "mask") if key in batch}
    draws = rng.random((len(operations), 2)) < CATEGORY_FLIP_CHANCE
    turns = rng.integers(4, size=len(operations))
    for i, names in enumerate(operations):
        axes = [axis for axis, name in ((-1, "hflip"), (-2, "vflip")) if name in names and draws[i, axis]]
        for values in changed.values():
            values[i] = values[i].flip(axes)
            if "rot90" in names:
                values[i] = torch.rot90(values[i], int(turns[i]), (-2, -1))
    return batch | changed


def random_tile(batch: Batch, side: int, rng: np.random.Generator) -> Batch:
    """One square of `side` pixels of each image, anywhere in it, and of its mask alike.

    With masks a tile has its own label: one of an anomalous image is normal where it shows no defect.
    """
    count, (height, width) = len(batch["image"]), batch["image"].shape[2:]
    top = rng.integers(height - side + 1, size=count)
    left = rng.integers(width - side + 1, size=count)
    cut = dict(batch)
    for key in ("image", "mask"):
        if key in batch:
            squares = [
                x[:, t : t + side, i : i + side] for x, t, i in zip(batch[key], top, left, strict=True)
            ]
            cut[key] = torch.stack(squares)
    cut["image"] = cut["image"].contiguous(memory_format=torch.channels_last)
    if "mask" in batch:
        cut["label"] = batch["label"] * cut["mask"].flatten(1).any(dim=1)
    return cut


def rescale(batch: Batch, scale: float) -> Batch:
    """Images (bilinear) and masks (nearest) at `scale` times their size, rounded to multiples of 32."""
    if scale == 1:
        return batch
    new = [scaled_side(side, scale) for side in batch["image"].shape[2:]]
    resized = dict(batch)
    resized["image"] = F.interpolate(batch["image"], size=new, mode="bilinear", align_corners=False)
    if "mask" in batch:
        resized["mask"] = F.interpolate(batch["mask"].float(), size=new, mode="nearest").to(
            batch["mask"].dtype
        )
    return resized
