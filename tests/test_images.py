"""Bad and unusual image files: each is read rightly or refused in one line (docs/IMAGES.md)."""

import os

import numpy as np
import pytest
from conftest import ROOT, write_mask
from image_cases import DEEP, PHOTO, UNIT, encoded, planes, png_header, rows, table, tiff
from PIL import Image

from datasets.files import find_images, list_images
from datasets.images import check_not_across, read_image, read_mask, upright_size
from datasets.transforms import Decode
from utils.errors import DatasetError
from utils.files import printable

CASES = list(rows())


def pixels(path) -> np.ndarray:
    return np.asarray(read_image(path))


class TestKindsOfPixels:
    @pytest.mark.parametrize("row", CASES, ids=lambda row: row.file[:30])
    def test_each_kind(self, tmp_path, row):
        """Read as the table says, or refused with its words."""
        for name, (content, expected) in row.cases.items():
            (tmp_path / "x.png").write_bytes(content)
            if isinstance(expected, str):
                with pytest.raises(DatasetError, match=f"x.png is no readable image: .*{expected}"):
                    read_image(tmp_path / "x.png")
                continue
            found = pixels(tmp_path / "x.png").astype(int)
            expected = expected if expected.ndim == 3 else expected[..., None]
            assert found.shape == (*expected.shape[:2], 3), name
            assert np.abs(found - expected).mean() <= row.tolerance, name

    def test_originals(self, shared_data):
        """CVC-ClinicDB as its authors publish it: colours, not three frames or a grey one."""
        for name in ("1", "100"):
            image = pixels(shared_data / f"originals/cvc-clinicdb/Original/{name}.tif").astype(int)
            assert image.shape == (288, 384, 3) and (image[..., 0] - image[..., 2]).mean() > 20  # mucosa
            mask = read_mask(shared_data / f"originals/cvc-clinicdb/Ground Truth/{name}.tif", 127 / 255).drawn
            assert mask.shape == (288, 384) and 0.01 < mask.mean() < 0.3

    def test_the_documentation_has_these_rows(self):
        """docs/IMAGES.md: print them anew with python tests/image_cases.py."""
        assert table(CASES) in (ROOT / "docs/IMAGES.md").read_text()

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
            whole = encoded(PHOTO, kind)
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


SEEDS = {
    "png": encoded(PHOTO, "PNG"),
    "jpeg": encoded(PHOTO, "JPEG", quality=90),
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "bmp": encoded(PHOTO, "BMP"),
    "tiff": encoded(PHOTO, "TIFF"),
    "lzw": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "planes": tiff(planes(DEEP), "rgb", planarconfig="separate"),
    "strips": tiff(DEEP, "rgb", rowsperstrip=5, compression="zlib", predictor=2),
    "tiles": tiff(1 - UNIT, "miniswhite", tile=(16, 16), bigtiff=True),
    "deflate": encoded(PHOTO, "TIFF", compression="tiff_adobe_deflate"),
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
