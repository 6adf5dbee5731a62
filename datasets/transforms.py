"""Decoding: files to uint8 arrays of the working size, and uint8 batches to normalised tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.images import check_not_across, read_image, read_mask, upright_size

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Decode:
    """How a file becomes an array: centre crop (zero-padded where it exceeds the image), then resize.

    size is (height, width); center_crop is a side in pixels, or up to 1 a share of each side. Masks are
    thresholded at `mask_threshold`, a share of the value range, then resized with nearest neighbour.
    """

    size: tuple[int, int]
    resize: str = "bilinear"
    center_crop: float | None = None
    mask_threshold: float = 0.0

    def image(self, path: Path) -> np.ndarray:
        """File to (H, W, 3) uint8 RGB.

        Raises:
            UnreadableImageError: as `read_image`, which also says how other kinds of pixels become RGB.
        """
        return np.asarray(self._fit(read_image(path), FILTERS[self.resize]))

    def planes(self, paths: Sequence[Path]) -> np.ndarray:
        """Three files to (H, W, 3) uint8, the grey values of one file a plane.

        Raises:
            UnreadableImageError: as `image`.
        """
        grey = [cv2.cvtColor(self.image(path), cv2.COLOR_RGB2GRAY) for path in paths]
        return np.stack(grey, axis=2)

    def mask(self, path: Path, *, of: Path | None = None) -> np.ndarray:
        """File to (H, W) uint8 in {0, 1}.

        Raises:
            UnreadableImageError: as `read_mask`.
            DatasetError: if the mask lies across the image `of`.
        """
        if of is not None:
            check_not_across(path, of)
        binary = Image.fromarray(read_mask(path, self.mask_threshold).astype(np.uint8))
        if of is not None and self.center_crop is not None:  # the crop is meant for the image's pixels
            binary = binary.resize(upright_size(of), Image.Resampling.NEAREST)
        return np.asarray(self._fit(binary, Image.Resampling.NEAREST))

    def _fit(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        if self.center_crop is not None:
            crop = self.center_crop
            wide, high = (round(crop * side) if crop <= 1 else int(crop) for side in image.size)
            left, top = (image.width - wide) // 2, (image.height - high) // 2
            image = image.crop((left, top, left + wide, top + high))
        height, width = self.size
        return image if image.size == (width, height) else image.resize((width, height), resample)


def has_foreground(path: Path) -> bool:
    """Whether anything is drawn in a mask file."""
    return bool(read_mask(path).any())


@dataclass(frozen=True)
class Normalise:
    """uint8 RGB to the backbone's input: (value / 255 - mean) / std, per channel."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, H, W) float32, channels last in memory."""
        scale, offset = self.factors()
        return torch.from_numpy(images * scale + offset).permute(0, 3, 1, 2)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """What a value is multiplied by and what is added then, (3,) float32 each."""
        scale = 1 / (255 * np.asarray(self.std, dtype=np.float32))
        return scale, -np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)
