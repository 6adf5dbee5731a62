"""Image files of every kind with what is read of them: the tests' cases and the tables of docs/IMAGES.md.

python tests/image_cases.py prints the tables.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import tifffile
from PIL import Image, PngImagePlugin

RAMP = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
UNIT = (RAMP / 65535).astype(np.float32)
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((32, 24))
)
DEEP = PHOTO.astype(np.uint16) * 256 + 99
GREY = np.asarray(Image.fromarray(PHOTO).convert("L"))
DRAWN = np.zeros((24, 32), bool)
DRAWN[4:14, 6:16] = True
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@dataclass(frozen=True)
class Row:
    """A line of the table. cases: name to (content, the (H, W, 3) or (H, W) image or the refusal's words).

    tolerance: the greatest mean difference.
    """

    file: str
    happens: str
    cases: dict[str, tuple[bytes, np.ndarray | str]]
    tolerance: float = 0


def encoded(image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, photometric: str = "minisblack", **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric=photometric, metadata=None, **options)
    return file.getvalue()


def with_tag(content: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a tag of one short number."""
    (start,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, start)
    for place in range(start + 2, start + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", content, place)[0] == tag:
            return content[: place + 8] + struct.pack("<H", value) + content[place + 10 :]
    raise AssertionError(tag)


def planes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(values, 2, 0))


def cv2_encoded(suffix: str, values: np.ndarray, options: Sequence[int] = ()) -> bytes:
    return cv2.imencode(suffix, values[..., ::-1] if values.ndim == 3 else values, options)[1].tobytes()


def windows_bitmap(alpha: int, colours: np.ndarray = PHOTO) -> bytes:
    """32 bits a pixel with bit fields, of which Windows leaves the fourth unused."""
    pixels = np.dstack([colours[::-1, :, ::-1], np.full(GREY.shape, alpha, np.uint8)]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, 32, 24, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    fields = struct.pack("<4I4s48x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    return struct.pack("<2sI4xI", b"BM", 122 + len(pixels), 122) + header + fields + pixels


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF of packed 12-bit grey."""
    pairs = values.astype(np.uint16).reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    head = with_tag(tiff(np.zeros((24, 48), np.uint8)), 256, 32)  # as many bytes
    head = with_tag(head, 258, 12)
    return head[: -packed.size] + packed.astype(np.uint8).tobytes()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    crc = struct.pack(">I", PngImagePlugin._crc32(body))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + crc + struct.pack(">I", 9) + b"IDAT"


def big_endian_tiff(values: np.ndarray) -> bytes:
    """One strip of 16-bit grey."""
    height, width = values.shape
    data = values.astype(">u2").tobytes()
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, height), (279, 4, len(data))]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in tags
    )
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    return b"MM\x00*" + struct.pack(">I", 8 + len(data)) + data + directory


def bomb() -> bytes:
    """A deflated strip of 16 MiB in a TIFF of 24 x 32 pixels."""
    inner = zlib.compress(bytes(1 << 24), 1)
    content = tiff(RAMP, compression="zlib", photometric="miniswhite")
    (start,) = struct.unpack_from("<I", content, 4)
    grown = content + inner
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        tag = struct.unpack_from("<H", content, place)[0]
        if tag in (273, 279):  # where the strip is, and its bytes
            value = len(content) if tag == 273 else len(inner)
            grown = grown[: place + 2] + struct.pack("<HII", 4, 1, value) + grown[place + 12 :]
    return grown


def palette_image() -> tuple[Image.Image, np.ndarray]:
    numbers = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 4
    colours = np.array([[9, 9, 9], [200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
    image = Image.fromarray(numbers, mode="P")
    image.putpalette(colours.tobytes())
    return image, colours[numbers]


def rows() -> Iterator[Row]:
    """The table, from the most to the least usual."""
    palette, looked_up = palette_image()
    clear = looked_up * (np.asarray(palette) != 1)[..., None]
    high = RAMP >> 8
    half = np.full(GREY.shape, 128, np.uint8)
    half[:8] = 0
    blended = (PHOTO * (half[..., None] / 255)).round().astype(np.uint8)
    yield Row(
        "8-bit grey and RGB, 1 bit",
        "as it is; grey is repeated to three channels",
        {
            "png": (encoded(PHOTO, "PNG"), PHOTO),
            "bmp": (encoded(PHOTO, "BMP"), PHOTO),
            "tiff": (encoded(PHOTO, "TIFF"), PHOTO),
            "lzw": (encoded(PHOTO, "TIFF", compression="tiff_lzw"), PHOTO),
            "packbits": (encoded(PHOTO, "TIFF", compression="packbits"), PHOTO),
            "planes": (tiff(planes(PHOTO), "rgb", planarconfig="separate"), PHOTO),
            "tiles": (tiff(PHOTO, "rgb", tile=(16, 16)), PHOTO),
            "big": (tiff(PHOTO, "rgb", bigtiff=True), PHOTO),
            "big, big endian": (tiff(PHOTO, "rgb", bigtiff=True, byteorder=">"), PHOTO),
            "grey": (encoded(GREY, "PNG"), GREY),
            "bits": (encoded(Image.fromarray(GREY > 99), "PNG"), 255 * (GREY > 99)),
            "fax": (encoded(Image.fromarray(GREY > 99), "TIFF", compression="group4"), 255 * (GREY > 99)),
        },
    )
    yield Row(
        "JPEG, also progressive, and JPEG inside of TIFF",
        "as libjpeg decodes it",
        {
            "jpeg": (encoded(PHOTO, "JPEG", quality=100, subsampling=0), PHOTO),
            "progressive": (encoded(PHOTO, "JPEG", quality=100, subsampling=0, progressive=True), PHOTO),
            "in tiff": (encoded(PHOTO, "TIFF", compression="jpeg", quality=100), PHOTO),
        },
        tolerance=3,
    )
    yield Row(
        "TIFF of photometric BlackIsZero with three samples",
        "red, green and blue (CVC-ClinicDB)",
        {
            "8": (with_tag(tiff(PHOTO, "rgb"), 262, 1), PHOTO),
            "16": (with_tag(tiff(DEEP, "rgb"), 262, 1), PHOTO),
            "extra samples": (tiff(PHOTO, planarconfig="contig"), PHOTO),
            "planes": (tiff(planes(PHOTO), planarconfig="separate", compression="zlib"), PHOTO),
        },
    )
    yield Row(
        "16-bit grey or RGB, 12-bit TIFF",
        "the high byte; 12-bit values in 16 bits come out dark: stretch all images alike beforehand",
        {
            "png": (encoded(RAMP, "PNG"), high),
            "png colour": (cv2_encoded(".png", DEEP), PHOTO),
            "tiff": (encoded(RAMP, "TIFF"), high),
            "lzw": (encoded(RAMP, "TIFF", compression="tiff_lzw"), high),
            "big endian": (big_endian_tiff(RAMP), high),
            "lzw colour": (cv2_encoded(".tif", DEEP), PHOTO),
            "planes": (tiff(planes(DEEP), "rgb", planarconfig="separate"), PHOTO),
            "tiled planes": (tiff(planes(DEEP), "rgb", planarconfig="separate", tile=(16, 16)), PHOTO),
            "deflated planes": (
                tiff(planes(DEEP), "rgb", planarconfig="separate", compression="zlib", predictor=2),
                PHOTO,
            ),
            "strips": (tiff(DEEP, "rgb", rowsperstrip=5, compression="zlib", byteorder=">"), PHOTO),
            "12 bits": (twelve_bits(RAMP >> 4), high),
        },
    )
    yield Row(
        "TIFF of photometric WhiteIsZero",
        "inverted, so that white is white",
        {
            "8": (tiff(255 - GREY, "miniswhite"), GREY),
            "8 lzw": (with_tag(encoded(255 - GREY, "TIFF", compression="tiff_lzw"), 262, 0), GREY),
            "16": (tiff(65535 - RAMP, "miniswhite"), high),
            "16 lzw": (with_tag(encoded(65535 - RAMP, "TIFF", compression="tiff_lzw"), 262, 0), high),
            "float": (tiff(1 - UNIT, "miniswhite"), np.rint(255 * UNIT)),
        },
    )
    yield Row(
        "floating-point TIFF (16, 32 or 64 bits)",
        "scaled from [0, 1]; other values are refused",
        {
            "16": (tiff(UNIT.astype(np.float16)), np.rint(255 * UNIT)),
            "32": (encoded(UNIT, "TIFF"), np.rint(255 * UNIT)),
            "32 lzw": (cv2_encoded(".tif", UNIT), np.rint(255 * UNIT)),
            "64": (tiff(UNIT.astype(np.float64), compression="zlib"), np.rint(255 * UNIT)),
            "colour": (tiff((PHOTO / 255).astype(np.float32), "rgb"), PHOTO),
            "more": (tiff(UNIT * 257), r"must be in \[0, 1\], found 0 to 257"),
            "NaN": (tiff(np.where(RAMP > 9, UNIT, np.nan)), r"must be in \[0, 1\], found nan"),
        },
        tolerance=0.05,
    )
    yield Row(
        "signed integers, and those of 32 or 64 bits",
        "refused: their range is not known",
        {
            "int8": (tiff(GREY.astype(np.int8)), "signed 8-bit integers have no range that is known"),
            "int16": (tiff(RAMP.astype(np.int16)), "signed 16-bit integers have no range that is known"),
            "int32": (tiff(RAMP.astype(np.int32)), "signed 32-bit integers have no range that is known"),
            "uint32": (tiff(RAMP.astype(np.uint32)), "32-bit integers have no range that is known"),
        },
    )
    yield Row(
        "other TIFF: raw, subsampled YCbCr, other numbers of bits or samples",
        "refused, naming its kind; save it as PNG",
        {
            "raw": (
                with_tag(tiff(RAMP), 262, 32803),
                "TIFF of photometric CFA.* is not read; save it as PNG",
            ),
            "ycbcr": (with_tag(tiff(PHOTO, "rgb"), 262, 6), "photometric YCBCR.*subsampled"),
            "lzw": (
                cv2_encoded(".tif", (PHOTO / 255).astype(np.float32), [cv2.IMWRITE_TIFF_COMPRESSION, 5]),
                "compression LZW, with 3 floating",
            ),
            "white": (
                tiff(255 - PHOTO, "miniswhite", planarconfig="contig"),
                "MINISWHITE.* 3 unsigned samples",
            ),
        },
    )
    yield Row(
        "palette",
        "colours are looked up",
        {"png": (encoded(palette, "PNG"), looked_up), "bmp": (encoded(palette, "BMP"), looked_up)},
    )
    yield Row(
        "alpha, or a transparent colour",
        "blended over black",
        {
            "png": (encoded(np.dstack([PHOTO, half]), "PNG"), blended),
            "16 bits": (
                cv2.imencode(".png", np.dstack([PHOTO[..., ::-1], half]) * np.uint16(257))[1].tobytes(),
                blended,
            ),
            "tiff": (encoded(np.dstack([PHOTO, half]), "TIFF"), blended),
            "16-bit planes": (
                tiff(
                    planes(np.dstack([PHOTO, half]) * np.uint16(257)),
                    "rgb",
                    planarconfig="separate",
                    extrasamples=["unassalpha"],
                ),
                blended,
            ),
            "premultiplied": (
                tiff(np.dstack([blended, half]) * np.uint16(257), "rgb", extrasamples=["assocalpha"]),
                blended,
            ),
            "palette": (encoded(palette, "PNG", transparency=1), clear),
            "16-bit grey": (
                encoded(RAMP, "PNG", transparency=int(RAMP[3, 4])),
                np.where(RAMP[3, 4] == RAMP, 0, high),
            ),
        },
        tolerance=1,
    )
    yield Row(
        "alpha that is 0 everywhere",
        "BMP: read as opaque; others are refused",
        {
            "bmp": (windows_bitmap(0), PHOTO),
            "opaque bmp": (windows_bitmap(255), PHOTO),
            "png": (encoded(np.dstack([PHOTO, half * 0]), "PNG"), "transparent everywhere"),
            "tiff": (
                tiff(np.dstack([DEEP, RAMP * 0]), "rgb", extrasamples=["unassalpha"]),
                "transparent everywhere",
            ),
        },
    )
    yield Row(
        "CMYK, YCbCr, other colour spaces",
        "converted without colour profile",
        {"cmyk": (encoded(Image.fromarray(PHOTO).convert("CMYK"), "JPEG", quality=100), PHOTO)},
        tolerance=4,
    )
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    turned = np.rot90(GREY, -1)
    yield Row(
        "EXIF orientation",
        "applied, as viewers show the image",
        {
            "jpeg": (encoded(GREY, "JPEG", exif=exif, quality=100), turned),
            "png": (encoded(GREY, "PNG", exif=exif), turned),
            "tiff": (encoded(GREY, "TIFF", exif=exif), turned),
            "16-bit tiff": (encoded(RAMP, "TIFF", exif=exif), np.rot90(high, -1)),
            "16-bit lzw": (
                encoded(RAMP, "TIFF", exif=exif, compression="tiff_lzw"),
                np.rot90(high, -1),
            ),
        },
        tolerance=1,
    )
    yield Row(
        "PNG named `.jpg`, JPEG named `.png`, and so on",
        "read by content",
        {"a": (encoded(PHOTO, "PNG"), PHOTO)},
    )
    first, second = Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)
    several = {"save_all": True, "append_images": [second]}
    yield Row(
        "animated PNG, TIFF of several pages",
        "refused: save each as a file of its own",
        {
            "png": (encoded(first, "PNG", **several), "several pictures"),
            "tiff": (encoded(first, "TIFF", **several), "several pictures"),
            "16-bit tiff": (tiff(np.stack([RAMP, RAMP])), "several pictures"),
        },
    )
    yield Row(
        "JPEG with further pictures behind it (MPO)",
        "the first picture",
        {"mpo": (encoded(first, "MPO", quality=100, subsampling=0, **several), PHOTO)},
        tolerance=3,
    )
    yield Row(
        "empty, or no image",
        "refused, saying what it is: a Git LFS pointer, GIF, WebP, HEIC, PDF, HTML and so on",
        {
            "empty": (b"", "the file is empty"),
            "text": (b"a text, not an image", "by its content no PNG, JPEG, BMP, TIFF, or damaged"),
            "lfs": (LFS, "by its content no PNG.* a Git LFS pointer .*git lfs pull"),
            "gif": (encoded(GREY, "GIF"), "by its content no PNG.* a GIF; save it as PNG"),
            "webp": (encoded(PHOTO, "WEBP"), "a WebP; save it as PNG"),
            "heic": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC, AVIF, JPEG 2000 or JPEG XL"),
            "html": (b"<!DOCTYPE html><html>", "HTML, XML or SVG"),
        },
    )
    yield Row(
        "truncated",
        "refused where a pixel is missing",
        {
            "png": (encoded(PHOTO, "PNG")[:-300], ""),
            "jpeg": (encoded(PHOTO, "JPEG")[:-300], ""),
            "tiff": (tiff(DEEP, "rgb")[:-300], "damaged or incomplete"),
            "deflate": (tiff(DEEP, "rgb", compression="zlib")[:-300], "damaged or incomplete"),
            "no directory": (encoded(PHOTO, "TIFF", compression="tiff_lzw")[:900], "damaged or incomplete"),
        },
    )
    whole = {kind: encoded(PHOTO, kind) for kind in ("PNG", "JPEG", "BMP")}
    zeroed = {kind: content[:-900] + bytes(900) for kind, content in whole.items()}
    yield Row(
        "end overwritten with zeros, as after a broken copy",
        "PNG and JPEG: refused; BMP and uncompressed TIFF: read as black",
        {
            "png": (zeroed["PNG"], ""),
            "jpeg": (zeroed["JPEG"], ""),
            "bmp": (zeroed["BMP"], np.where(np.arange(24)[:, None, None] < 10, 0, PHOTO)),
        },
        tolerance=9,
    )
    yield Row(
        "single damaged bytes",
        "PNG: refused (checksums); others: refused where the decoder notices",
        {"png": (whole["PNG"][:200] + b"\0\0" + whole["PNG"][202:], "")},
    )
    yield Row(
        "smaller than 8 pixels on a side (1 x 1)",
        "refused: enlarged it shows nothing",
        {
            "png": (encoded(GREY[:1, :1], "PNG"), "1 x 1 pixels, 8 a side are the least"),
            "tiff": (tiff(RAMP[:1, :1]), "1 x 1 pixels, 8 a side are the least"),
        },
    )
    yield Row(
        "more than 2^27 pixels (20000 x 20000), or 1 GiB",
        "refused from the header, nothing is decoded",
        {
            "12000": (png_header(12_000, 12_000), "pixels"),
            "20000": (png_header(20_000, 20_000), "pixels"),
            "tiff": (with_tag(with_tag(tiff(RAMP), 256, 20_000), 257, 20_000), "20000 x 20000 pixels"),
            "strip that inflates": (bomb(), "damaged or incomplete"),
        },
    )


def palette_mask(*colours: tuple[int, int, int], numbers: np.ndarray = DRAWN) -> bytes:
    image = Image.fromarray(numbers.astype(np.uint8), mode="P")
    image.putpalette([c for colour in colours for c in colour])
    return encoded(image, "PNG")


def mask_rows() -> Iterator[Row]:
    """The table of masks at threshold 0; each case that is read shows DRAWN."""
    grey = 255 * DRAWN.astype(np.uint8)
    colours = np.dstack([DRAWN, 0 * DRAWN, 0 * DRAWN]).astype(np.uint8)
    black, white, red = (0, 0, 0), (255, 255, 255), (1, 0, 0)
    yield Row(
        "any value but 0 in any channel",
        "drawn, such as (1, 0, 0), or -1 in signed integers",
        {
            "255": (encoded(grey, "PNG"), DRAWN),
            "1": (encoded(grey // 255, "BMP"), DRAWN),
            "bits": (encoded(Image.fromarray(DRAWN), "PNG"), DRAWN),
            "red": (encoded(colours, "PNG"), DRAWN),
            "blue": (encoded(colours[..., ::-1], "TIFF", compression="tiff_lzw"), DRAWN),
            "16 bits": (encoded(DRAWN.astype(np.uint16), "PNG"), DRAWN),
            "16-bit colours": (cv2_encoded(".png", colours.astype(np.uint16)), DRAWN),
            "16-bit LZW": (cv2_encoded(".tiff", 255 * colours.astype(np.uint16)), DRAWN),
            "16-bit planes": (
                tiff(planes(colours.astype(np.uint16)), "rgb", planarconfig="separate"),
                DRAWN,
            ),
            "float": (tiff(7 * DRAWN.astype(np.float32)), DRAWN),
            "-1": (tiff(-DRAWN.astype(np.int32)), DRAWN),
            "int8 -1": (tiff(-DRAWN.astype(np.int8)), DRAWN),
            "uint32": (tiff(DRAWN.astype(np.uint32)), DRAWN),
        },
    )
    yield Row(
        "TIFF of photometric WhiteIsZero",
        "what is shown white is drawn",
        {
            "8": (tiff(255 - grey, "miniswhite"), DRAWN),
            "16": (tiff((1 - DRAWN.astype(np.uint16)) * 65535, "miniswhite"), DRAWN),
            "float": (tiff(1 - DRAWN.astype(np.float32), "miniswhite"), DRAWN),
        },
    )
    yield Row(
        "JPEG",
        "drawn above half of the highest value (16 of 255 at least), as compression blurs borders",
        {
            "grey": (encoded(grey, "JPEG", quality=80), DRAWN),
            "dark": (encoded(grey // 2, "JPEG", quality=80), DRAWN),
            "half a channel": (encoded(128 * colours, "JPEG", quality=75, subsampling=0), DRAWN),
            "TIFF": (encoded(grey, "TIFF", compression="jpeg", quality=80), DRAWN),
            "colour": (encoded(255 * colours[..., ::-1], "JPEG", quality=90, subsampling=0), DRAWN),
        },
    )
    yield Row(
        "palette",
        "black is background; if all is black, number 0; refused if no pixel is black or transparent",
        {
            "usual": (palette_mask(black, red), DRAWN),
            "white first": (palette_mask(white, black, numbers=~DRAWN), DRAWN),
            "all black": (palette_mask(black, black), DRAWN),
            "no black": (palette_mask(white, (200, 0, 0)), "none of its palette's colours is black"),
        },
    )
    yield Row(
        "alpha, or a transparent colour",
        "transparent is background; strokes in black are drawn; refused if all is transparent",
        {
            "white": (encoded(np.dstack([grey * 0 + 255] * 3 + [grey]), "PNG"), DRAWN),
            "black": (encoded(np.dstack([grey * 0] * 3 + [grey]), "PNG"), DRAWN),
            "black grey": (encoded(np.dstack([grey * 0, grey]), "PNG"), DRAWN),
            "opaque": (encoded(np.dstack([grey] * 3 + [grey * 0 + 255]), "PNG"), DRAWN),
            "bmp": (windows_bitmap(0, np.dstack([grey] * 3)), DRAWN),
            "all transparent": (encoded(np.dstack([grey] * 3 + [grey * 0]), "PNG"), "transparent everywhere"),
        },
    )


def table(of: Sequence[Row]) -> str:
    """Rows as the table of docs/IMAGES.md."""
    lines = [f"{row.file} | {row.happens}" for row in of]
    return "\n".join(["file | what happens", "--- | ---", *lines])


if __name__ == "__main__":
    print(table(list(rows())), table(list(mask_rows())), sep="\n\n")
