"""Image files of any origin to 8-bit RGB, and masks, or a refusal with its reason: none is read wrongly.

What each kind of file gets is listed in docs/IMAGES.md.
"""

import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from datasets.files import LFS_POINTER
from datasets.tiff import SEVERAL, SIGNATURES, RefusedError, Samples, Tiff
from utils.errors import DatasetError
from utils.files import printable

MAX_PIXELS = 1 << 27  # 134 million: larger headers are refused before anything is decoded
NOISE = 16  # of 255: below it are the traces that JPEG leaves in a black mask
MIN_SIDE = 8  # pixels; what is smaller shows nothing when it is enlarged
FORMATS = ("PNG", "JPEG", "BMP", "TIFF")  # by content, whatever the name says
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 274  # EXIF tag
NEWER = "but HEIC, AVIF, JPEG 2000 or JPEG XL; save it as PNG"
OTHERS = (  # what is found under an image's name: from which byte it begins how
    (0, b"version https://git-lfs", f"but {LFS_POINTER}"),
    (0, b"GIF8", "but a GIF; save it as PNG"),
    (0, b"RIFF", "but a WebP; save it as PNG"),
    (0, b"8BPS", "but a Photoshop file; save it as PNG"),
    (0, b"%PDF", "but a PDF; save its pictures as PNG"),
    (0, b"<", "but a text (HTML, XML or SVG)"),
    *((4, start, NEWER) for start in (b"ftyp", b"jP  ", b"JXL ")),
)
TRANSPARENT = "it is transparent everywhere (its alpha is 0)"
Picture = Image.Image | Tiff  # opened, not decoded
T = TypeVar("T")


class UnreadableImageError(DatasetError):
    """A file that is not read; `reason` says why `path` is not, the message also what to do."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(
            f"{printable(path)} is no readable image: {reason}; replace or remove it, "
            "or leave out all such files with --skip-unreadable"
        )


def read_image(path: Path) -> Image.Image:
    """The file in mode RGB, turned upright by its EXIF orientation.

    16 bits are scaled by the type's range (the high byte is kept), floating point from [0, 1]; what is
    transparent is blended over black; grey is repeated, palettes are looked up, CMYK is converted without
    colour profile. Raises UnreadableImageError for anything that is no undamaged still PNG, JPEG, BMP or TIFF
    of MIN_SIDE pixels a side or more and MAX_PIXELS in all.
    """
    return use_image(path, _to_rgb)


def to_rgb(picture: Image.Image | np.ndarray, *, name: str = "this") -> Image.Image:
    """A PIL image, or an (H, W, 3) uint8 RGB array, as `read_image` gives what a file holds. Raises
    ValueError saying what is wrong with it, under that name.
    """
    try:
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise RefusedError(f"it is an array {picture.shape} of {picture.dtype}")
            picture = Image.fromarray(picture) if picture.size else Image.new("RGB", picture.shape[1::-1])
        if not isinstance(picture, Image.Image):
            raise RefusedError(f"it is a {type(picture).__name__}")
        _check_kind(picture)
        return _to_rgb(picture)
    except Exception as error:  # decoders raise many kinds, as in `use_image`
        wanted = "give a path, a PIL image, or an (H, W, 3) uint8 RGB array"
        raise ValueError(f"{name} is no readable image: {error or type(error).__name__}; {wanted}") from error


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from the header alone; errors as of `read_image`."""

    def size(picture: Picture) -> tuple[int, int]:
        if isinstance(picture, Tiff):
            turned = picture.orientation in TURNED
        else:  # Pillow turns a TIFF itself, its size included
            turned = picture.format != "TIFF" and picture.getexif().get(ORIENTATION) in TURNED
        return (picture.size[1], picture.size[0]) if turned else picture.size

    return use_image(path, size, decode=False)


def check_not_across(mask: Path, image: Path) -> None:
    """DatasetError if a mask lies across its image, as one drawn on a photograph before it was turned."""
    (width, height), size = upright_size(mask), upright_size(image)
    if width != height and size == (height, width):
        sizes = f"{mask} is {width} x {height}, but its image {image} is {height} x {width}"
        raise DatasetError(f"{sizes} (after its EXIF orientation); turn the mask")


def use_image(path: Path, use: Callable[[Picture], T], *, decode: bool = True) -> T:
    """What `use` makes of the opened file; an UnreadableImageError for whatever it or the file's decoders
    raise.

    decode: check what the decoders do not look at, too.
    """
    tiff, head = None, b""
    try:
        with warnings.catch_warnings(), _open_regular(path) as file:
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of size (own limit) and odd metadata
            head = file.read(32)
            file.seek(0)
            if head.startswith(SIGNATURES):
                tiff = Tiff(file)
                _check_size(*tiff.size)
                if not tiff.for_pillow:
                    return use(tiff)
            if decode:
                _check_integrity(file)
            with Image.open(file, formats=FORMATS) as image:
                _check_kind(image)
                return use(image)
    except RefusedError as error:
        raise UnreadableImageError(path, str(error)) from error
    except UnidentifiedImageError as error:
        other = next((text for at, start, text in OTHERS if head[at:].startswith(start)), "or damaged")
        none = f"by its content no {', '.join(FORMATS)}, {other}"
        raise UnreadableImageError(path, str(tiff.not_read()) if tiff else none) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(path, f"it has more than the {MAX_PIXELS} pixels that are read") from error
    except Exception as error:  # decoders raise many kinds: OSError, SyntaxError, struct.error, KeyError, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImageError(path, f"{reason or 'damaged'} ({type(error).__name__})") from error


def _open_regular(path: Path) -> BinaryIO:
    status = path.stat()  # follows links; a loop or a broken one raises
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise RefusedError("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if status.st_size == 0:
        raise RefusedError("the file is empty")
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
            raise RefusedError("its end is missing")
    file.seek(0)


def _check_kind(image: Image.Image) -> None:
    _check_size(*image.size)
    # MPO: a camera's JPEG with further pictures (previews, depth) behind the photograph, which comes first
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise RefusedError(SEVERAL)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RefusedError(f"it has {width} x {height} pixels, at most {MAX_PIXELS} are read")
    if min(width, height) < MIN_SIDE:
        raise RefusedError(f"it has {width} x {height} pixels, {MIN_SIDE} a side are the least")


def decoded(picture: Picture) -> Image.Image | Samples:
    """The upright pixels; alpha that is 0 all over a BMP is dropped: there it stands for "not used"."""
    if isinstance(picture, Tiff):
        return picture.samples()
    picture.load()
    image = ImageOps.exif_transpose(picture)
    if picture.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")
    if image.mode.startswith("I;16"):
        values, clear = np.asarray(image), image.info.get("transparency")
        return Samples(values, 16, None if clear is None else np.where(values == clear, 0, 65535))
    return image


def _to_rgb(picture: Picture) -> Image.Image:
    image = decoded(picture)
    if isinstance(image, Image.Image) and image.mode in ("I", "F"):  # Pillow would cut off above 255
        image = Samples(np.asarray(image), 0)
    if isinstance(image, Samples):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")  # blended over black: no viewer shows the colours below transparent pixels
    if not image.getchannel("A").getbbox():
        raise RefusedError(TRANSPARENT)
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


def _eight_bits(samples: Samples) -> Image.Image:
    """Values scaled to mode RGB or RGBA."""
    alpha, colours = samples.alpha, Image.fromarray(_scaled(samples.values, samples.bits)).convert("RGB")
    if alpha is not None:
        if not alpha.any():
            raise RefusedError(TRANSPARENT)
        if not samples.premultiplied:  # else the colours are over black already
            colours.putalpha(Image.fromarray(_scaled(alpha, samples.bits)))
    return colours


def _scaled(values: np.ndarray, bits: int) -> np.ndarray:
    highest = highest_value(values, bits)
    if values.dtype.kind == "f":
        return np.rint(255 * values / highest).astype(np.uint8)
    return (values >> (bits - 8)).astype(np.uint8)  # the high byte, as Pillow does for 16 bits a colour


def highest_value(values: np.ndarray, bits: int) -> int:
    """The highest value that samples of this kind may have: 1 of floating-point ones, which must be in [0,
    1]. A RefusedError for integers of unknown range.
    """
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also false for NaN
            raise RefusedError(f"floating-point values must be in [0, 1], found {low:g} to {high:g}")
        return 1
    if bits == 0:
        kind = f"{'signed ' * (values.dtype.kind == 'i')}{8 * values.dtype.itemsize}-bit integers"
        raise RefusedError(f"{kind} have no range that is known, save it with 8 or 16 unsigned bits")
    return (1 << bits) - 1


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
    all their colours are black, the numbers other than 0 count. What is no image, or leaves open what is
    drawn, is an UnreadableImageError.
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
