"""Image files of any origin to 8-bit RGB, or a refusal with its reason: no file is read wrongly in silence.

What each kind of file gets is listed in docs/IMAGES.md.
"""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from datasets.samples import DatasetError, printable

MAX_PIXELS = 1 << 27  # 134 million: larger headers are refused before anything is decoded
MIN_SIDE = 8  # pixels; what is smaller shows nothing when it is enlarged
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # by content, whatever the name says
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 274  # EXIF tag
T = TypeVar("T")


class UnreadableImageError(DatasetError):
    """A file that is not read; `reason` says why, the message also which and what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{printable(path)} is no readable image: {reason}; replace or remove it, "
            "or leave out all such files with --skip-unreadable"
        )


def read_image(path: Path) -> Image.Image:
    """The file in mode RGB, turned upright by its EXIF orientation.

    16 bits are scaled by the type's range (the high byte is kept), floating point from [0, 1]; what is
    transparent is blended over black; grey is repeated, palettes are looked up, CMYK is converted without
    colour profile.

    Raises:
        UnreadableImageError: for anything that is no undamaged still PNG, JPEG, BMP or TIFF of MIN_SIDE
            pixels a side or more and MAX_PIXELS in all.
    """
    return _guarded(path, _to_rgb)


def mask_values(path: Path, *, indices: bool = True) -> tuple[np.ndarray, float]:
    """(H, W) values of a mask file and the highest possible one.

    indices: of a file with a palette take the colours' numbers (they are the labels), not their brightness.

    Raises:
        UnreadableImageError: as `read_image`.
    """
    return _guarded(path, lambda image: _to_values(image, indices))


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from the header alone.

    Raises:
        UnreadableImageError: as `read_image`, as far as the header tells.
    """
    return _guarded(path, _upright_size, decode=False)


def check_not_across(mask: Path, image: Path) -> None:
    """Stop if a mask lies across its image, as it does if it was drawn on a photograph before it was turned.

    Raises:
        DatasetError: naming both and their sizes.
    """
    (width, height), size = upright_size(mask), upright_size(image)
    if width != height and size == (height, width):
        raise DatasetError(
            f"{mask} is {width} x {height}, but its image {image} is {height} x {width} "
            "(after its EXIF orientation); turn the mask"
        )


def _guarded(path: Path, use: Callable[[Image.Image], T], *, decode: bool = True) -> T:
    """`use` of the opened image; whatever Pillow raises for a damaged file becomes one kind of error."""
    try:
        with warnings.catch_warnings(), _open_regular(path) as file:
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of size (own limit) and odd metadata
            if decode:
                _check_integrity(file)
            with Image.open(file, formats=FORMATS) as image:
                _check_kind(image)
                return use(image)
    except _RefusedError as error:
        raise UnreadableImageError(path, str(error)) from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError(path, f"by its content no {', '.join(FORMATS)}, or damaged") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(path, f"it has more than the {MAX_PIXELS} pixels that are read") from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, KeyError, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(path, f"{reason or 'damaged'} ({type(error).__name__})") from error


class _RefusedError(Exception):
    """Read, but not taken."""


def _open_regular(path: Path) -> BinaryIO:
    status = path.stat()  # follows links; a loop or a broken one raises
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise _RefusedError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if status.st_size == 0:
        raise _RefusedError("the file is empty")
    return path.open("rb")


def _check_integrity(file: BinaryIO) -> None:
    """What the decoders do not look at: checksums of PNG, and JPEG files whose end was never written."""
    with Image.open(file, formats=FORMATS) as image:
        _check_kind(image)
        kind = image.format
        if kind == "PNG":
            image.verify()
    if kind == "JPEG":
        file.seek(-min(file.seek(0, 2), 1 << 16), 2)
        tail = file.read()
        # libjpeg decodes the zeros of a copy that was broken off as grey
        if tail.endswith(b"\0") and not tail.rstrip(b"\0").endswith(b"\xff\xd9"):
            raise _RefusedError("its end is missing")
    file.seek(0)


def _check_kind(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _RefusedError(f"it has {width} x {height} pixels, at most {MAX_PIXELS} are read")
    if min(width, height) < MIN_SIDE:
        raise _RefusedError(f"it has {width} x {height} pixels, {MIN_SIDE} a side are the least")
    # MPO: a camera's JPEG with further pictures (previews, depth) behind the photograph, which comes first
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _RefusedError("it holds several pictures (animation or pages), save them one a file")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Pillow turns a TIFF itself, its size included
    turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
    return image.size[::-1] if turned else image.size


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) >> 8  # as Pillow does for 16 bits a colour
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.rint(255 * _unit_range(image)).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise _RefusedError("32-bit integers have no range that is known, save it with 8 or 16 bits")
    return _over_black(image).convert("RGB")


def _unit_range(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
        low, high = values.min(), values.max()
        raise _RefusedError(f"floating-point values must be in [0, 1], found {low:g} to {high:g}")
    return values


def _over_black(image: Image.Image) -> Image.Image:
    """What is transparent becomes black: the colours below it are arbitrary, no viewer shows them."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


def _to_values(image: Image.Image, indices: bool) -> tuple[np.ndarray, float]:
    image = _upright(image)
    if image.mode.startswith("I;16"):
        return np.asarray(image), 65535
    if image.mode == "F":
        return _unit_range(image), 1
    if image.mode == "I":
        return np.asarray(image), 2**31 - 1
    kept = image.mode == "L" or (image.mode == "P" and indices)
    return np.asarray(image if kept else _over_black(image).convert("L")), 255
