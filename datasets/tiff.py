"""TIFF files: which layouts Pillow reads rightly, which tifffile does, and which are refused and why."""

import logging
import zlib
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, little and big endian
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR = 0, 1, 2, 5, 6  # photometric interpretations
UNCOMPRESSED, JPEG = 1, 7  # compressions
PLAIN = (UNCOMPRESSED, 8, 32946)  # and deflate under both of its numbers: tifffile alone decodes these
PREMULTIPLIED, STRAIGHT = 1, 2  # kinds of alpha among the extra samples
FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}  # sample formats
MAX_BYTES = 1 << 30  # of a decoded file
SEVERAL = "it holds several pictures (animation or pages), save each as a file of its own"
DAMAGED = "its data is damaged or incomplete"
logging.getLogger("tifffile").disabled = True  # it reports every odd tag; what stops it is raised


class RefusedError(Exception):
    """A file that could be opened but is not read; the message is the reason."""


@dataclass(frozen=True)
class Samples:
    """Upright pixels of more than 8 bits, or of a layout that Pillow does not know.

    values: (H, W) or (H, W, 3), black is 0. bits: of an unsigned value; 0 for signed and floating-point ones,
    and for unsigned ones whose range is not known. alpha: (H, W), of the same kind, or None.
    """

    values: np.ndarray
    bits: int
    alpha: np.ndarray | None = None
    premultiplied: bool = False


class Tiff:
    """The header of a TIFF file; `samples` decodes it.

    size: (width, height) as stored. orientation: the EXIF orientation, 1 to 8. for_pillow: Pillow reads it.
    Raises RefusedError for several pages, and for none, as in a file that was cut.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, tiff = file, tifffile.TiffFile(file)
        if not len(tiff.pages):
            raise RefusedError(DAMAGED)
        if len(tiff.pages) > 1:
            raise RefusedError(SEVERAL)
        self.page = page = tiff.pages.first
        self.size = page.imagewidth, page.imagelength
        self.count, self.photometric = page.samplesperpixel, int(page.photometric)
        orientation = page.tags.valueof("Orientation", 1)
        self.orientation = orientation if orientation in range(1, 9) else 1
        self.depths, self.formats = _kinds(page.bitspersample), _kinds(page.tags.valueof("SampleFormat", 1))
        kinds = [int(e) if e in (PREMULTIPLIED, STRAIGHT) else 0 for e in page.extrasamples]
        self.alpha = kinds[-1] if kinds else 0  # of the last sample; 0: it is none
        self.odd = any(kinds[:-1])
        self.for_pillow = self._suits_pillow()

    def __str__(self) -> str:
        page = self.page
        names = (str(getattr(e, "name", e)) for e in (page.photometric, page.compression))
        kind = "/".join(FORMATS.get(k, "undefined") for k in sorted(self.formats))
        bits = "/".join(map(str, sorted(self.depths)))
        samples = f"{self.count} {kind} sample{'s' * (self.count > 1)} of {bits} bits per pixel"
        return "a TIFF of photometric {}, compression {}, with {}".format(*names, samples)

    def _suits_pillow(self) -> bool:
        """Of other layouts Pillow takes the first plane for the image, or scrambles the samples."""
        page, grey = self.page, self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
        if not self.formats <= {1, 4} or (page.parent.is_bigtiff and page.parent.byteorder == ">"):
            return False  # 4: undefined
        if max(self.depths) > 8:  # colours of which it keeps the high byte
            planes = page.planarconfig != 1 and page.compression == UNCOMPRESSED
            plain = self.photometric == RGB and page.compression in PLAIN
            return self.depths == {16} and self.photometric in (RGB, CMYK) and not (planes or plain)
        if grey and self.count > 1:
            return self.count == 2 and bool(self.alpha) and page.planarconfig == 1
        if self.photometric == YCBCR and page.compression != JPEG and page.is_subsampled:
            raise RefusedError(f"it is {self}, subsampled, which is not read; save it as PNG")
        return True

    def samples(self) -> Samples:
        """Decode what is not `for_pillow`; a RefusedError where that cannot be done rightly."""
        if len(self.depths) > 1 or len(self.formats) > 1:
            raise self.not_read()
        (bits,), (kind,) = self.depths, self.formats
        plain = self.page.compression in PLAIN and self.page.predictor < 3 and bits in (8, 16, 32, 64)
        found = self._by_tifffile() if plain else self._by_pillow()
        if self.photometric == WHITE_IS_ZERO:
            if kind == 2 or found.values.ndim == 3:
                raise self.not_read()
            found = replace(found, values=(1 if kind == 3 else (1 << bits) - 1) - found.values)
        return replace(found, bits=bits if kind == 1 and bits <= 16 else 0)

    def not_read(self) -> RefusedError:
        """The refusal of this layout."""
        return RefusedError(f"it is {self}, which is not read; save it as PNG")

    def _by_tifffile(self) -> Samples:
        page, colours = self.page, self.count - bool(self.alpha)
        # three samples are colours, whatever the photometric tag says: the images of CVC-ClinicDB are so
        grey = colours == 1 and self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO)
        known = grey or (colours == 3 and self.photometric == BLACK_IS_ZERO)
        known |= colours >= 3 and self.photometric == RGB  # further ones are no colours
        if not known or self.odd or page.axes not in ("YX", "YXS", "SYX") or page.dtype is None:
            raise self.not_read()
        _check_data(page, page.dtype.itemsize)
        values = page.asarray()
        values = np.moveaxis(values, 0, 2) if page.axes == "SYX" else values.reshape(*values.shape[:2], -1)
        values = _upright(values, self.orientation)
        alpha = values[..., -1] if self.alpha else None
        return Samples(values[..., 0] if grey else values[..., :3], 0, alpha, self.alpha == PREMULTIPLIED)

    def _by_pillow(self) -> Samples:
        """Grey of more than 8 bits, in a compression that tifffile needs further packages for."""
        if self.count > 1 or (self.depths == {32} and self.page.parent.byteorder == ">"):
            raise self.not_read()  # Pillow takes the first plane, and does not swap these bytes
        try:
            with Image.open(self.file, formats=("TIFF",)) as image:
                image.load()  # turns it, too
        except UnidentifiedImageError as error:
            raise self.not_read() from error
        return Samples(np.asarray(image), 0)


def _kinds(value: int | tuple[int, ...]) -> set[int]:
    return set(value) if isinstance(value, tuple) else {value}


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, ...) turned as their EXIF orientation says."""
    values = values.swapaxes(0, 1) if orientation > 4 else values
    down, right = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return values[::down, ::right]


def _check_data(page: tifffile.TiffPage, itemsize: int) -> None:
    """Stop where tifffile would fill what is missing with zeros, or inflate without bound."""
    file, offsets, lengths = page.parent.filehandle, page.dataoffsets, page.databytecounts
    if page.nbytes > MAX_BYTES:
        raise RefusedError(f"it decodes to {page.nbytes} bytes, at most {MAX_BYTES} are read")
    if len(offsets) != np.prod(page.chunked) or len(lengths) != len(offsets) or sum(lengths) > file.size:
        raise RefusedError(DAMAGED)
    down, whole = page.chunked[page.axes.index("Y")], int(np.prod(page.chunks)) * itemsize
    for i, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        expected = whole
        if not page.is_tiled:  # the last strip may have fewer rows
            rows = min(page.rowsperstrip, page.imagelength)
            expected = whole // rows * min(rows, page.imagelength - i % down * rows)
        complete = length >= expected
        if page.compression != UNCOMPRESSED:
            file.seek(offset)
            complete = expected <= len(zlib.decompressobj().decompress(file.read(length), whole + 1)) <= whole
        if not complete or offset + length > file.size:
            raise RefusedError(DAMAGED)
