"""Bad and unusual image files: each is read rightly or refused in one line (docs/IMAGES.md)."""

import io
import os
import struct

import cv2
import numpy as np
import pytest
from conftest import write_mask
from PIL import Image, PngImagePlugin

from datasets.images import check_not_across, mask_values, read_image, upright_size
from datasets.samples import DatasetError, find_images, list_images, printable
from datasets.transforms import Decode

RAMP = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((32, 24))
)


def pixels(path) -> np.ndarray:
    return np.asarray(read_image(path))


class TestKindsOfPixels:
    def test_16_bits_are_scaled_not_clipped(self, tmp_path):
        """Pillow's own conversion of 16-bit grey turns all above 255 white."""
        Image.fromarray(RAMP).save(tmp_path / "g.png")
        Image.fromarray(RAMP).save(tmp_path / "g.tif")
        cv2.imwrite(str(tmp_path / "c.png"), np.dstack([RAMP] * 3))
        cv2.imwrite(str(tmp_path / "c.tif"), np.dstack([RAMP] * 3))
        (tmp_path / "big-endian.tif").write_bytes(big_endian_tiff(RAMP))
        for name in ("g.png", "g.tif", "c.png", "c.tif", "big-endian.tif"):
            found = pixels(tmp_path / name)
            assert found.dtype == np.uint8 and (found == (RAMP >> 8)[..., None]).all(), name

    def test_floating_point(self, tmp_path):
        for name, values, message in (
            ("a.tif", RAMP / 65535, None),
            ("b.tif", RAMP / 255, "found 0 to 257"),
            ("c.tif", np.where(RAMP > 9, RAMP / 65535, np.nan), r"must be in \[0, 1\], found nan"),
        ):
            Image.fromarray(values.astype(np.float32)).save(tmp_path / name)
            if message:
                with pytest.raises(DatasetError, match=message):
                    read_image(tmp_path / name)
            else:
                assert (pixels(tmp_path / name)[..., 0] == np.rint(RAMP / 257)).mean() > 0.99

    def test_32_bit_integers_are_refused(self, tmp_path):
        Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "i.tif")
        with pytest.raises(DatasetError, match="no range that is known"):
            read_image(tmp_path / "i.tif")

    def test_transparency_is_black(self, tmp_path):
        """Not the colours below it, which no viewer shows."""
        alpha = np.full(PHOTO.shape[:2], 255, np.uint8)
        alpha[:8], alpha[8:12] = 0, 128
        Image.fromarray(np.dstack([PHOTO, alpha])).save(tmp_path / "rgba.png")
        found = pixels(tmp_path / "rgba.png")
        assert not found[:8].any() and (found[12:] == PHOTO[12:]).all()
        assert np.abs(found[8:12] - PHOTO[8:12] * (128 / 255)).max() <= 1
        Image.fromarray(np.dstack([PHOTO[..., 0], alpha])).save(tmp_path / "la.png")
        assert not pixels(tmp_path / "la.png")[:8].any()
        palette = Image.fromarray(np.arange(24 * 32, dtype=np.uint8).reshape(24, 32) % 4, mode="P")
        palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
        palette.save(tmp_path / "p.png", transparency=1)
        assert pixels(tmp_path / "p.png")[0, :4].tolist() == [[9, 9, 9], [0, 0, 0], [0, 200, 0], [0, 0, 200]]

    def test_cmyk(self, tmp_path):
        Image.fromarray(PHOTO).convert("CMYK").save(tmp_path / "c.jpg", quality=100)
        assert np.abs(pixels(tmp_path / "c.jpg").astype(int) - PHOTO).mean() < 4

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
    def test_exif_orientation_is_applied(self, tmp_path, suffix):
        """As every viewer shows it; a mask drawn on the unturned photograph is refused, not stretched."""
        grey = Image.fromarray(PHOTO).convert("L")
        exif = Image.Exif()
        exif[274] = 6  # to be turned by 90 degrees clockwise
        grey.save(tmp_path / f"a.{suffix}", exif=exif)
        turned = np.rot90(np.asarray(grey), -1)
        found = pixels(tmp_path / f"a.{suffix}")[..., 0]
        assert found.shape == (32, 24) and np.abs(found - turned.astype(int)).mean() < 3
        assert upright_size(tmp_path / f"a.{suffix}") == (24, 32)
        write_mask(tmp_path / "upright.png", size=(32, 24))
        write_mask(tmp_path / "across.png", size=(24, 32))
        write_mask(tmp_path / "smaller.png", size=(16, 12))
        for name in ("upright.png", "smaller.png"):
            check_not_across(tmp_path / name, tmp_path / f"a.{suffix}")
        with pytest.raises(DatasetError, match=r"across\.png is 32 x 24, but its image .* is 24 x 32"):
            Decode((64, 64)).mask(tmp_path / "across.png", of=tmp_path / f"a.{suffix}")

    def test_masks(self, tmp_path):
        mask = np.zeros((10, 10), np.uint8)
        mask[:2] = 255
        Image.fromarray(mask.astype(np.uint16) * 257).save(tmp_path / "16.png")
        Image.fromarray((mask / 255).astype(np.float32)).save(tmp_path / "float.tif")
        Image.fromarray((mask // 255).astype(np.int32)).save(tmp_path / "numbers.tif")
        drawn = np.dstack([np.full((10, 10, 3), 255, np.uint8), mask])  # white, where it is not transparent
        Image.fromarray(drawn).save(tmp_path / "layer.png")
        for path in sorted(tmp_path.iterdir()):
            assert Decode((10, 10)).mask(path).sum() == 20, path.name
        assert mask_values(tmp_path / "16.png")[1] == 65535 and mask_values(tmp_path / "float.tif")[1] == 1


class TestFilesThatAreRefused:
    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("empty.png", b"", "the file is empty"),
            ("text.png", b"a text, not an image", "by its content no PNG"),
            ("page.png", b"GIF89a" + bytes(40), "by its content no PNG"),
        ],
    )
    def test_no_image(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DatasetError, match=f"{name} is no readable image: .*{message}.*--skip-unreadable"
        ):
            read_image(tmp_path / name)

    def test_wrong_extension_is_read_by_content(self, tmp_path):
        Image.fromarray(PHOTO).save(tmp_path / "a.jpg", format="PNG")
        assert (pixels(tmp_path / "a.jpg") == PHOTO).all()

    def test_sizes(self, tmp_path):
        Image.new("L", (1, 1)).save(tmp_path / "dot.png")
        with pytest.raises(DatasetError, match="1 x 1 pixels, 8 a side are the least"):
            read_image(tmp_path / "dot.png")
        for side in (12_000, 20_000):  # below and above Pillow's own limit
            (tmp_path / "bomb.png").write_bytes(png_header(side, side))
            with pytest.raises(DatasetError, match=r"pixels"):
                read_image(tmp_path / "bomb.png")

    def test_several_pictures(self, tmp_path):
        first, second = Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)
        for name in ("animated.png", "pages.tif"):
            first.save(tmp_path / name, save_all=True, append_images=[second])
            with pytest.raises(DatasetError, match="several pictures"):
                read_image(tmp_path / name)
        first.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[second])
        assert np.abs(pixels(tmp_path / "camera.jpg").astype(int) - PHOTO).mean() < 30  # the photograph

    def test_what_is_no_file(self, tmp_path):
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "broken.png").symlink_to("nowhere")
        (tmp_path / "loop.png").symlink_to("loop.png")
        os.mkfifo(tmp_path / "pipe.png")
        assert [p.name for p in list_images(tmp_path)] == ["broken.png", "loop.png", "pipe.png"]
        for name, message in (
            ("folder.png", "it is a folder"),
            ("broken.png", "No such file"),
            ("loop.png", "symbolic links"),
            ("pipe.png", "no regular file"),  # opening it would wait forever
        ):
            with pytest.raises(DatasetError, match=message):
                read_image(tmp_path / name)

    def test_the_end_of_a_broken_copy(self, tmp_path):
        """Zeros instead of the second half: decoders make grey of them, without a word."""
        for kind in ("PNG", "JPEG"):
            whole = encoded(kind)
            for cut in range(len(whole) // 2, len(whole) - 12, 7):
                (tmp_path / "x").write_bytes(whole[:cut] + bytes(len(whole) - cut))
                with pytest.raises(DatasetError):
                    read_image(tmp_path / "x")
            (tmp_path / "x").write_bytes(whole + bytes(100))  # padding behind the end is harmless
            assert pixels(tmp_path / "x").shape == PHOTO.shape


def test_listing_follows_links_once(tmp_path):
    for name in ("a/1.png", "a/b/2.JPG", "far/3.png", ".cache/4.png", "a/.5.png", "a/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/self").symlink_to("self")
    (tmp_path / "a/linked").symlink_to(tmp_path / "far")
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path / "a")]
    assert found == ["a/1.png", "a/b/2.JPG", "a/linked/3.png"]


def test_names_on_one_line(tmp_path):
    assert printable(tmp_path / "ü 'a'\n\x1b.png").endswith(r"ü 'a'\n\x1b.png")
    assert printable(os.fsdecode(b"\xff.png")) == r"\udcff.png"


# --- fuzzing ------------------------------------------------------------------------------------------------


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, kind, **options)
    return file.getvalue()


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


SEEDS = {
    "png": encoded("PNG"),
    "jpeg": encoded("JPEG", quality=90),
    "progressive": encoded("JPEG", progressive=True),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "lzw": encoded("TIFF", compression="tiff_lzw"),
    "deflate": encoded("TIFF", compression="tiff_adobe_deflate"),
}


class TestDamagedFiles:
    """Every mutation of a good file gives an image of the right kind, or a DatasetError, and nothing else."""

    @pytest.fixture(params=SEEDS)
    def seed(self, request, tmp_path):
        whole = SEEDS[request.param]
        self.path = tmp_path / "x.png"
        self.path.write_bytes(whole)
        self.whole = self.decoded()
        return request.param, whole, np.random.default_rng(list(SEEDS).index(request.param))

    def decoded(self) -> np.ndarray | None:
        try:
            image = Decode((16, 20)).image(self.path)
        except DatasetError as error:
            assert str(self.path) in str(error) and "\n" not in str(error)
            return None
        assert image.shape == (16, 20, 3) and image.dtype == np.uint8
        return image

    def test_truncated(self, seed):
        """Refused, unless all pixels are there; never an image that ends in grey."""
        _, whole, _ = seed
        for cut in np.linspace(0, len(whole) - 1, 40).astype(int):
            self.path.write_bytes(whole[:cut])
            image = self.decoded()
            assert image is None or (image == self.whole).all()

    def test_flipped_bits(self, seed):
        kind, whole, rng = seed
        for _ in range(40):
            damaged = bytearray(whole)
            for place in rng.integers(len(whole), size=rng.integers(1, 4)):
                damaged[place] ^= 1 << int(rng.integers(8))
            self.path.write_bytes(damaged)
            image = self.decoded()
            if kind == "png":  # has checksums
                assert image is None or (image == self.whole).all()

    def test_edited_header(self, seed):
        _, whole, rng = seed
        for _ in range(40):
            damaged = bytearray(whole)
            place = int(rng.integers(min(120, len(whole) - 4)))
            damaged[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\x00\x00\x00\x01", rng.bytes(4)]
            )
            self.path.write_bytes(damaged)
            self.decoded()
