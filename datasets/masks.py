"""What is drawn in a mask file, by the rules of docs/IMAGES.md."""

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageFile

from datasets.images import ORIENTATION, TRANSPARENT, Picture, decoded, highest_value, use_image
from datasets.tiff import RefusedError, Samples

NOISE = 16  # of 255: below it are the traces that JPEG leaves in black


@dataclass(frozen=True)
class Mask:
    """What a mask file holds. drawn: (H, W) bool. values: (H, W), of several channels the highest.

    high: the highest possible value; None where the range is not known.
    """

    drawn: np.ndarray
    values: np.ndarray
    high: int | None

    @property
    def levels(self) -> int:
        """The number of different values."""
        if self.values.dtype == np.uint8:
            return int(np.count_nonzero(np.bincount(self.values.ravel(), minlength=256)))
        return len(np.unique(self.values))


def read_mask(path: Path, threshold: float = 0) -> Mask:
    """What is drawn in a mask file: pixels with any channel above `threshold`, a share of the range.

    At 0 any value but zero counts, except in JPEG (also inside of TIFF), whose compression surrounds what is
    drawn with low values: there it is half of the highest one. Transparent pixels are background; where
    nothing else is above the threshold, the opaque ones count (strokes in black). Palettes are looked up; if
    all their colours are black, the numbers other than 0 count.
    Raises UnreadableImageError as `read_image`, for values without a known range if the threshold is not 0,
    for a palette image without black or transparent pixels, whose background is not known, and for colours of
    16 bits in a TIFF that is compressed and turned.
    """
    return use_image(path, lambda picture: _to_mask(picture, threshold))


def _to_mask(picture: Picture, threshold: float) -> Mask:
    samples, image = _samples(picture), picture if isinstance(picture, Image.Image) else None
    lossy = image and (image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg")
    if threshold == 0 and lossy:
        threshold = max(NOISE, samples.values.max() / 2) / 255
    mask, alpha = _drawn(samples, threshold), samples.alpha
    if alpha is None or alpha.all():
        if image and image.mode == "P" and mask.drawn.all():
            raise RefusedError("none of its palette's colours is black, so what is background is not known")
        return mask
    if not alpha.any():
        raise RefusedError(TRANSPARENT)
    visible = alpha != 0
    drawn = mask.drawn & visible
    return replace(mask, drawn=drawn if drawn.any() else visible)


def _samples(picture: Picture) -> Samples:
    deep = _deep_colours(picture) if isinstance(picture, ImageFile.ImageFile) else None
    image = deep or decoded(picture)
    if isinstance(image, Samples):
        return image
    alpha = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else None
    values = np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    if image.mode == "P" and not values.any():
        values = np.asarray(image)
    return Samples(values, 8, alpha)


def _deep_colours(picture: ImageFile.ImageFile) -> Samples | None:
    """The pixels of a PNG or compressed TIFF with colours of 16 bits, of which Pillow keeps the high byte."""
    deep = picture.format in ("PNG", "TIFF") and ";16" in str(picture.tile)
    if not deep or picture.mode.startswith("I;16") or picture.fp is None:
        return None
    picture.fp.seek(0)  # to be read before Pillow does, which closes the file
    content = picture.fp.read()
    picture.load()  # raises for damage, of which OpenCV writes to stderr
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim < 3:
        raise RefusedError("its colours of 16 bits are not read in this layout; save it with 8 bits")
    if picture.getexif().get(ORIENTATION, 1) != 1:
        raise RefusedError("it is turned by its EXIF orientation and has colours of 16 bits; save it upright")
    return Samples(values[..., :3], 16, values[..., 3] if values.shape[2] == 4 else None)


def _drawn(samples: Samples, threshold: float) -> Mask:
    values, high = samples.values, (1 << samples.bits) - 1 or None
    if values.dtype.kind == "f":
        high = 1
        if not np.isfinite(values).all():
            raise RefusedError("it has values that are no numbers")
    drawn = values > threshold * highest_value(values, samples.bits) if threshold else values != 0
    if values.ndim == 3:
        drawn, values = drawn.any(axis=2), values.max(axis=2)
    return Mask(drawn, values, high)
