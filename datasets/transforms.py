"""Decoding: files to uint8 arrays of the working size, and uint8 batches to normalised tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datasets.images import check_not_across, read_image, read_mask, upright_size
from utils.config import Config, scaled_side
from utils.distributed import rank, world_size
from utils.errors import DatasetError

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # of Pillow's filters, in pixels on each side
FILTERS = {name: Image.Resampling[name.upper()] for name in SUPPORT}
UNIT = 2.0**22  # of their weights in Pillow
GREY = (9798, 19235, 3735)  # OpenCV's shares of red, green and blue, in units of 2^-15


@dataclass(frozen=True)
class Decode:
    """How a file becomes an array: centre crop (zero-padded where it exceeds the image), then resize.

    size is (height, width). center_crop is a side in pixels, or up to 1 a share of each side. Masks are
    thresholded at `mask_threshold`, a share of the value range, then resized by `resize_mask`.
    """

    size: tuple[int, int]
    resize: str = "bilinear"
    center_crop: float | None = None
    mask_threshold: float = 0.0

    def image(self, path: Path) -> np.ndarray:
        """File to (H, W, 3) uint8 RGB."""
        return np.asarray(self.fit(read_image(path)))

    def fit(self, image: Image.Image) -> Image.Image:
        """An image of any size, cropped and resized, to the same bytes with each version of Pillow.

        One call for both sides begins with the rows, but in Pillow 13 with the columns where the height
        shrinks more than twice as much as the width. Many values then differ by 1.
        """
        image, (height, width) = self._crop(image), self.size
        for size in ((width, image.height), (width, height)):
            image = image if image.size == size else image.resize(size, FILTERS[self.resize])
        return image

    def fit_tensor(self, images: Tensor) -> Tensor:
        """As `fit`, to the bit: uint8 (..., H, W, 3) of any size to whole numbers (..., 3, height, width) in
        float64, by operations that a graph can be exported of.

        Pillow rounds to 8 bits after the rows, and after the columns. Its weights are whole multiples of
        1 / UNIT, which float64 sums without rounding, so two matrix products do the same.
        """
        values = images.movedim(-1, -3).double()
        columns, rows = (self._weights(values.shape[axis], axis) for axis in (-1, -2))
        return _to_bytes(rows @ _to_bytes(values @ columns.T))

    def _weights(self, length: int, axis: int) -> Tensor:
        """(height or width, length) float64: the share of each pixel of a side in each new one, times UNIT.

        axis: -1 for rows, whose length is the width; -2 for columns. Operations are in Pillow's order.
        """
        count, crop = self.size[axis], self.center_crop
        padding = 0 if crop is None or crop <= 1 else int(crop)  # such a crop may exceed the image
        places = torch.arange(length + 2 * padding).double() - padding
        whole = places[-1] + 1 - padding  # the length as a tensor, with which a graph can calculate
        side = whole
        if crop is not None:
            side = (_exact(crop) * whole).round() if crop <= 1 else torch.full_like(whole, int(crop))
        places = places - ((whole - side) / 2).floor()
        scale = side / count
        stretch = scale.clamp(min=1)  # more pixels count where an image shrinks: no aliasing
        support = SUPPORT[self.resize] * stretch
        centre = (torch.arange(count).double()[:, None] + 0.5) * scale
        first = (centre - support + 0.5).clamp(min=0).floor()
        last = torch.minimum((centre + support + 0.5).floor(), side)
        inside = (places >= first) & (places < last)
        shares = _kernel((places - centre + 0.5) * (1 / stretch), self.resize) * inside
        shares = shares / shares.sum(dim=1, keepdim=True)
        weights = shares.sign() * (shares.abs() * UNIT + 0.5).floor()
        return weights[:, padding : padding + length]

    def to_image(self, anomaly_map: np.ndarray, width: int, height: int) -> np.ndarray:
        """A map (H, W) float32 of the working size to (height, width), its image's own: `fit` backwards.

        Bilinear, antialiased where it shrinks. What a centre crop cuts off, the model has not seen: there it
        is the map's lowest value.
        """
        left, top, right, bottom = self._crop_box(width, height)
        part = Image.fromarray(anomaly_map).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
        whole = Image.new("F", (width, height), float(anomaly_map.min()))
        whole.paste(part, (left, top))
        return np.array(whole)

    def stacked(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Three images to (H, W, 3) uint8, the grey values of each image as one channel."""
        fitted = [np.asarray(self.fit(image)) for image in images]
        return np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in fitted], axis=2)

    def mask(self, *paths: Path, of: Path | None = None) -> np.ndarray:
        """File, or files of which each pixel counts, to (H, W) uint8 in {0, 1}; a DatasetError if a mask lies
        across the image `of`, or masks of one image differ in size.
        """
        if of is not None:
            for path in paths:
                check_not_across(path, of)
        drawn = united(paths, [read_mask(path, self.mask_threshold).drawn for path in paths])
        return self.fit_mask(drawn, of)

    def fit_mask(self, drawn: np.ndarray, of: Path | None = None) -> np.ndarray:
        """(H, W) bool to (height, width) uint8 in {0, 1}; a centre crop is one of the image `of`."""
        mask = drawn.astype(np.uint8)
        if of is not None and self.center_crop is not None:  # the crop is meant for the image's pixels
            mask = resize_mask(mask, upright_size(of)[::-1])
        return resize_mask(np.asarray(self._crop(Image.fromarray(mask))), self.size)

    def _crop(self, image: Image.Image) -> Image.Image:
        return image if self.center_crop is None else image.crop(self._crop_box(*image.size))

    def _crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        crop = 1.0 if self.center_crop is None else self.center_crop
        wide, high = (round(crop * side) if crop <= 1 else int(crop) for side in (width, height))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


def _kernel(x: Tensor, name: str) -> Tensor:
    size = x.abs()
    if name == "bilinear":
        return (1 - size).clamp(min=0)
    if name == "bicubic":
        near = (1.5 * size - 2.5) * size * size + 1
        far = (((size - 5) * size + 8) * size - 4) * -0.5
        return near * (size < 1) + far * ((size >= 1) & (size < 2))
    return _sinc(x) * _sinc(x / 3) * ((x >= -3) & (x < 3))


def _sinc(x: Tensor) -> Tensor:
    angle, zero = x * _exact(math.pi), (x == 0).double()
    return (angle.sin() + zero) / (angle + zero)


def _exact(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)  # the exporter would round a plain number to float32


def _to_bytes(sums: Tensor) -> Tensor:
    return (sums / UNIT + 0.5).floor().clamp(0, 255)


def grey_tensor(images: Tensor) -> Tensor:
    """As OpenCV's COLOR_RGB2GRAY, to the bit: whole numbers (..., 3, H, W) to (..., H, W)."""
    shares = torch.tensor(GREY, dtype=images.dtype)[:, None, None]
    return ((images * shares).sum(dim=-3) / 2**15 + 0.5).floor()


def united(paths: Sequence[Path], masks: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W) bool, where any of an image's masks is. Raises DatasetError if they differ in size."""
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != masks[0].shape:
            sizes = " and ".join(f"{m.shape[1]} x {m.shape[0]}" for m in (masks[0], mask))
            raise DatasetError(f"{paths[0]} and {path}, masks of one image, are {sizes}")
    return np.logical_or.reduce(masks)


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 in {0, 1} to `size` (height, width) by nearest neighbour, which loses no region.

    A connected region (8 neighbours) of which no pixel is met keeps one: that at the place of its middle one.
    """
    (high, wide), (height, width) = mask.shape, size
    if mask.shape == size:
        return mask
    resized = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if height >= high and width >= wide:
        return resized
    count, regions = cv2.connectedComponents(mask, connectivity=8)
    small = np.asarray(Image.fromarray(regions).resize((width, height), Image.Resampling.NEAREST))
    for lost in np.flatnonzero(np.bincount(small.ravel(), minlength=count) == 0):
        ys, xs = np.nonzero((regions == lost) & (mask > 0))
        if len(ys):
            y, x = ys[len(ys) // 2], xs[len(ys) // 2]
            resized[(2 * y + 1) * height // (2 * high), (2 * x + 1) * width // (2 * wide)] = 1
    return resized


@dataclass(frozen=True)
class Normalise:
    """uint8 RGB to the backbone's input: (value / 255 - mean) / std, per channel."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, images: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 to (B, 3, H, W) float32, channels last in memory."""
        scale, offset = self.factors()
        return torch.from_numpy(images * scale + offset).permute(0, 3, 1, 2)

    def pixels(self, images: Tensor) -> np.ndarray:
        """Back again: (B, 3, H, W) to (B, H, W, 3) uint8, the very values that it was given."""
        scale, offset = self.factors()
        return np.rint((images.permute(0, 2, 3, 1).numpy() - offset) / scale).astype(np.uint8)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """What a value is multiplied by and what is added then, (3,) float32 each."""
        scale = 1 / (255 * np.asarray(self.std, dtype=np.float32))
        return scale, -np.asarray(self.mean, dtype=np.float32) / np.asarray(self.std, dtype=np.float32)


Batch = dict[str, Tensor]
CATEGORY_FLIP_CHANCE = 0.3  # of the public code of UniAS
IMAGES = ("image", "clean")  # keys of a batch that geometry changes like its mask


def degraded(image: np.ndarray, rng: np.random.Generator, *, frames: bool = False) -> np.ndarray:
    """An image (H, W, 3) uint8 as a worse camera gives it: half are blurred, a third are JPEG-compressed.

    frames: its channels are grey frames, each of which is compressed by itself.
    """
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3))
    if rng.random() < 0.35:
        how = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))]
        parts = cv2.split(image) if frames else (image[..., ::-1],)  # OpenCV's colours are BGR
        files = [cv2.imencode(".jpg", part, how)[1] for part in parts]
        read = np.dstack([np.asarray(cv2.imdecode(file, cv2.IMREAD_UNCHANGED)) for file in files])
        image = read if frames else read[..., ::-1]
    return image


def flip(batch: Batch, rng: np.random.Generator) -> Batch:
    """Mirror each image, and its mask, left to right and upside down, each with p = 0.5."""
    flipped = {key: batch[key] for key in (*IMAGES, "mask") if key in batch}
    for axis in (-1, -2):
        chosen = torch.from_numpy(_sample(rng.random, len(batch["image"])) < 0.5).view(-1, 1, 1, 1)
        chosen = chosen.to(batch["image"].device, non_blocking=True)
        flipped = {key: torch.where(chosen, values.flip(axis), values) for key, values in flipped.items()}
    return batch | flipped


def flip_rotate(batch: Batch, rng: np.random.Generator) -> Batch:
    """Flip each image along either axis (p = 0.5 each) and rotate it by up to 90 degrees both ways.

    Beyond the border image and mask go on mirrored. Masks stay binary.
    """
    images = batch["image"]
    count, height, width = len(images), *images.shape[2:]
    angle = torch.tensor(_sample(lambda n: rng.uniform(-math.pi / 2, math.pi / 2, n), count))
    flip_x, flip_y = (torch.tensor(_sample(lambda n: rng.choice([-1.0, 1.0], n), count)) for _ in range(2))
    cos, sin, aspect = angle.cos(), angle.sin(), height / width
    # rotation in pixels, written in coordinates that run from -1 to 1 along both sides
    matrix = torch.zeros(count, 2, 3, dtype=torch.float64)
    matrix[:, 0, 0], matrix[:, 0, 1] = flip_x * cos, -flip_x * sin * aspect
    matrix[:, 1, 0], matrix[:, 1, 1] = flip_y * sin / aspect, flip_y * cos
    grid = F.affine_grid(matrix.to(images, non_blocking=True), list(images.shape), align_corners=False)
    warp = partial(F.grid_sample, grid=grid, padding_mode="reflection", align_corners=False)
    warped = batch | {key: warp(batch[key]) for key in IMAGES if key in batch}
    if "mask" in batch:
        mask = batch["mask"]
        warped["mask"] = warp(mask.to(images), mode="nearest").to(mask.dtype)
    return warped


AUGMENTATIONS = {"flip": flip, "flip-rotate": flip_rotate}  # data.augment


def by_category(batch: Batch, operations: Sequence[Sequence[str]], rng: np.random.Generator) -> Batch:
    """Change each image, and its mask, by its own operations, in this order.

    hflip mirrors left to right and vflip upside down, both with p = 0.3; rot90 turns a square image by 0, 90,
    180 or 270 degrees, equally likely.
    """
    changed = {key: batch[key].clone() for key in (*IMAGES, "mask") if key in batch}
    draws = _sample(lambda n: rng.random((n, 2)), len(operations)) < CATEGORY_FLIP_CHANCE
    turns = _sample(lambda n: rng.integers(4, size=n), len(operations))
    for i, names in enumerate(operations):
        axes = [axis for axis, name in ((-1, "hflip"), (-2, "vflip")) if name in names and draws[i, axis]]
        for values in changed.values():
            values[i] = values[i].flip(axes)
            if "rot90" in names:
                values[i] = torch.rot90(values[i], int(turns[i]), (-2, -1))
    return batch | changed


def random_tile(batch: Batch, side: int, rng: np.random.Generator) -> Batch:
    """Cut one square of `side` pixels out of each image, anywhere in it, and out of its mask alike.

    With masks a tile has its own label: one of an anomalous image is normal where it shows no defect.
    """
    count, (height, width) = len(batch["image"]), batch["image"].shape[2:]
    top = _sample(lambda n: rng.integers(height - side + 1, size=n), count)
    left = _sample(lambda n: rng.integers(width - side + 1, size=n), count)
    cut = dict(batch)
    for key in batch.keys() & {*IMAGES, "mask"}:
        corners = zip(batch[key], top, left, strict=True)
        cut[key] = torch.stack([values[:, y : y + side, x : x + side] for values, y, x in corners])
    for key in batch.keys() & set(IMAGES):
        cut[key] = cut[key].contiguous(memory_format=torch.channels_last)
    if "mask" in batch:
        cut["label"] = batch["label"] * cut["mask"].flatten(1).any(dim=1)
    return cut


def rescale(batch: Batch, scale: float) -> Batch:
    """Images (bilinear) and masks (nearest) at `scale` times their size, rounded to multiples of 32."""
    if scale == 1:
        return batch
    new = [scaled_side(side, scale) for side in batch["image"].shape[2:]]
    resize = partial(F.interpolate, size=new, mode="bilinear", align_corners=False)
    resized = batch | {key: resize(batch[key]) for key in IMAGES if key in batch}
    if "mask" in batch:
        mask = batch["mask"]
        resized["mask"] = F.interpolate(mask.float(), size=new, mode="nearest").to(mask.dtype)
    return resized


def _sample(draw: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    """Random numbers for the `count` images of this process, out of those for the global batch."""
    first = rank() * count
    return draw(count * world_size())[first : first + count]


def augment_batch(batch: Batch, config: Config, step: int, categories: Sequence[str] = ()) -> Batch:
    """A step's batch as it is trained on: augmented, a tile of it, at one size; by seed and step alone.

    categories: of each image.
    """
    turn, scale = divmod(step, len(config.train.scales))
    rng = np.random.default_rng([config.train.seed, turn])
    if config.data.augment == "by-category":
        operations = [config.data.augment_by_category.get(name, ()) for name in categories]
        batch = by_category(batch, operations, rng)
    elif config.data.augment != "none":
        batch = AUGMENTATIONS[config.data.augment](batch, rng)
    if config.data.tile is not None:
        batch = random_tile(batch, config.data.tile, np.random.default_rng([config.train.seed, turn, 1]))
    return rescale(batch, config.train.scales[scale])
