"""The mask that is used is the mask that was drawn; what shows nothing is found before training."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ROOT, write_image, write_mask
from image_cases import DRAWN, cv2_encoded, encoded, mask_rows, table
from PIL import Image

from datasets.build import build_data, build_test
from datasets.check import check_category, check_masks, filter_unreadable
from datasets.images import read_mask
from datasets.industrial import FOLDER, list_folder
from datasets.loader import ImageSet
from datasets.medical import CLINICDB
from datasets.samples import ANOMALOUS, Sample, unused_samples
from datasets.transforms import Decode, Normalise, resize_mask
from evaluation.scoring import Scores, results_by_category
from utils.errors import DatasetError

CASES = list(mask_rows())
NORMALISE = Normalise((0.5,) * 3, (0.5,) * 3)
GREY = 255 * DRAWN.astype(np.uint8)


class TestReading:
    @pytest.mark.parametrize("row", CASES, ids=lambda row: row.file[:30])
    def test_each_kind(self, tmp_path, row):
        for name, (content, expected) in row.cases.items():
            (tmp_path / "x.png").write_bytes(content)
            if isinstance(expected, str):
                with pytest.raises(DatasetError, match=expected):
                    read_mask(tmp_path / "x.png")
            else:
                assert (read_mask(tmp_path / "x.png").drawn == expected).all(), name

    def test_damaged_16_bit_colours(self, tmp_path, capfd):
        """As of other files, the reason is the damage; OpenCV writes nothing to stderr."""
        content = bytearray(cv2_encoded(".tiff", np.dstack([DRAWN] * 3).astype(np.uint16)))
        content[12:40] = bytes(28)
        (tmp_path / "x.tif").write_bytes(content)
        with pytest.raises(DatasetError, match="decoder error"):
            read_mask(tmp_path / "x.tif")
        assert "OpenCV" not in capfd.readouterr().err

    def test_the_documentation_has_these_rows(self):
        assert table(CASES) in (ROOT / "docs/IMAGES.md").read_text()

    @pytest.mark.parametrize("high", [255, 65535, 1.0])
    def test_thresholds(self, tmp_path, high):
        """A share of the range, which floating-point values must keep, in any channel."""
        values = np.array([[0, 0.4], [0.6, 1]]).repeat(8, 0).repeat(8, 1) * high
        kind = {255: np.uint8, 65535: np.uint16, 1.0: np.float32}[high]
        tifffile.imwrite(tmp_path / "m.tif", values.astype(kind))
        tifffile.imwrite(
            tmp_path / "c.tif", np.dstack([0 * values, values, 0 * values]).astype(kind), photometric="rgb"
        )
        for name in ("m.tif", "c.tif"):
            for threshold, count in ((0, 192), (0.5, 128), (0.7, 64)):
                assert read_mask(tmp_path / name, threshold).drawn.sum() == count

    @pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32])
    def test_a_threshold_needs_a_range(self, tmp_path, kind):
        tifffile.imwrite(tmp_path / "m.tif", DRAWN.astype(kind))
        with pytest.raises(DatasetError, match="no range that is known"):
            read_mask(tmp_path / "m.tif", 0.5)


class TestResizing:
    def test_no_region_is_lost(self):
        mask = np.zeros((128, 96), np.uint8)
        mask[10:40, 10:40] = mask[100:102, 50:52] = mask[60, 5] = mask[127, 95] = mask[70:72, 60] = 1
        for size in ((32, 32), (17, 5), (8, 96), (128, 11), (200, 7)):
            small = resize_mask(mask, size)
            nearest = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
            assert small.shape == size and (small >= nearest).all() and (small - nearest).sum() <= 4
            for y, x in ((100, 50), (60, 5), (127, 95), (70, 60)):
                y, x = y * size[0] // 128, x * size[1] // 96
                assert small[max(y - 1, 0) : y + 3, max(x - 1, 0) : x + 3].any(), (size, y, x)

    def test_nearest_where_nothing_is_lost(self):
        """Bit for bit, enlarged or reduced."""
        mask = np.zeros((90, 120), np.uint8)
        mask[20:50, 30:80] = mask[60:80, 10:20] = 1
        for size in ((45, 60), (64, 64), (90, 120), (200, 300), (30, 300)):
            nearest = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
            assert (resize_mask(mask, size) == np.asarray(nearest)).all()


def samples(folder, masks: dict[str, bytes | None]) -> list[Sample]:
    found = []
    for name, content in masks.items():
        write_image(folder / f"test/spot/{name}.png", np.random.default_rng(len(name)), size=(24, 32))
        mask = folder / f"ground_truth/spot/{name}_mask.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            mask.write_bytes(content)
        path = folder / f"test/spot/{name}.png"
        found.append(Sample(path, ANOMALOUS, mask if content else None, "part", "test", "spot", name))
    return found


class TestCheck:
    GOOD = encoded(GREY, "PNG")

    def check(self, folder, masks, **options) -> list[str]:
        return check_masks("folder", samples(folder, masks), Decode((24, 32), **options))

    def test_good_ones(self, tmp_path):
        assert self.check(tmp_path, {"a": self.GOOD, "b": self.GOOD}) == []

    @pytest.mark.parametrize(("mask", "threshold", "reason"), [
        (GREY * 0, 0, "its highest value is 0 of 255"),
        (GREY // 255, 127 / 255, "its highest value is 1 of 255"),
        (GREY // 3, 0.5, "its highest value is 85 of 255"),
    ])  # fmt: skip
    def test_empty_ones(self, tmp_path, mask, threshold, reason):
        """0 and 1 under a threshold of half the range, for one."""
        masks = {"a": self.GOOD, "b": encoded(mask, "PNG")}
        with pytest.raises(
            DatasetError,
            match=rf"1 of 2 masks of folder show nothing at data.mask_threshold=.*b_mask\.png .*{reason}",
        ):
            self.check(tmp_path, masks, mask_threshold=threshold)
        kept, skipped = filter_unreadable(samples(tmp_path, masks), threshold)
        assert len(kept) == 1 and list(skipped) == [tmp_path / "ground_truth/spot/b_mask.png"]

    def test_warnings(self, tmp_path):
        """Each is a line with the number and an example."""
        wide = encoded(255 * (GREY == 0).astype(np.uint8), "PNG")
        levels = encoded(np.where(DRAWN, np.arange(32, dtype=np.uint8), 0), "PNG")
        found = self.check(tmp_path, {"a": self.GOOD, "b": wide, "c": levels, "d": None, "e": levels})
        assert len(found) == 3
        assert "2 masks have more than two grey levels" in found[0] and "c_mask.png" in found[0]
        assert "1 masks cover more than half" in found[1] and "b_mask.png: 87%" in found[1]
        assert "4 of 5 anomalous images have masks" in found[2] and "d.png has none" in found[2]
        assert self.check(tmp_path, {"c": levels}, mask_threshold=0.01) == []

    @pytest.mark.parametrize(("size", "told"), [((24, 40), 1), ((48, 64), 0), ((11, 14), 0), ((13, 16), 0)])
    def test_other_proportions(self, tmp_path, size, told):
        """The images have 24 x 32; masks of another crop are told, masks with rounded sides are not."""
        mask = np.zeros(size, np.uint8)
        mask[2:4, 2:4] = 255
        found = self.check(tmp_path, {"a": encoded(mask, "PNG"), "b": self.GOOD})
        assert len(found) == told
        assert not told or "1 masks have other proportions than their images" in found[0]
        assert not told or "a_mask.png: 40 x 24 for 32 x 24" in found[0]

    def test_a_crop_that_leaves_nothing(self, tmp_path):
        corner = np.zeros((24, 32), np.uint8)
        corner[:3, :3] = 255
        found = self.check(tmp_path, {"a": encoded(corner, "PNG"), "b": self.GOOD}, center_crop=12)
        assert len(found) == 1 and "1 masks have nothing inside of data.center_crop" in found[0]

    def test_clinicdb_with_masks_of_0_and_1(self, tmp_path):
        """They would all be empty, and Dice 100 percent."""
        for split in ("train", "test"):
            for name in ("1", "2"):
                write_image(
                    tmp_path / f"random/{split}/images/{name}.png",
                    np.random.default_rng([ord(split[1]), int(name)]),
                )
                write_mask(tmp_path / f"random/{split}/masks/{name}.png")
        row = check_category(CLINICDB, tmp_path, "random")
        assert row.problem == ""
        path = tmp_path / "random/test/masks/2.png"
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)
        row = check_category(CLINICDB, tmp_path, "random")
        assert row.status == "damaged" and "1 of 4 masks of clinicdb show nothing" in row.problem

    def test_own_folder(self, mvtec_like):
        (mvtec_like / "part/ground_truth/spot/002_mask.png").unlink()
        row = check_category(FOLDER, mvtec_like, "part")
        assert "4 of 5 anomalous images have masks" in row.note

    @pytest.mark.parametrize("command", ["train", "test"])
    def test_before_training_and_before_testing(self, mvtec_like, make_config, command, caplog):
        folder = mvtec_like / "part/ground_truth/spot"
        Image.fromarray(np.full((48, 40), 255, np.uint8)).save(folder / "001_mask.png")
        config = make_config(run__data_root=str(mvtec_like), data__category="part")

        def build():
            return (
                build_data(config, NORMALISE) if command == "train" else build_test(config, config, NORMALISE)
            )

        build()
        assert "1 masks cover more than half of the image" in caplog.text
        Image.fromarray(np.zeros((48, 40), np.uint8)).save(folder / "001_mask.png")
        with pytest.raises(DatasetError, match="1 of 5 masks of .* show nothing"):
            build()


class TestPairing:
    """Masks of an own folder, by the names that people and tools give them."""

    @pytest.fixture
    def part(self, mvtec_like):
        """A category without masks, with three images 000 to 002 of spots."""
        shutil.rmtree(mvtec_like / "part/ground_truth")
        return mvtec_like / "part"

    def pairs(self, part) -> dict[str, list[str]]:
        tested = (s for s in list_folder(part.parent, "part") if s.defect == "spot")
        return {s.path.stem: [p.relative_to(part).as_posix() for p in s.masks] for s in tested}

    @pytest.mark.parametrize(
        "ending", ["", "_mask", "_gt", "_MASK", "-mask", ".GT", "_ground_truth", "_label", "_mask_0"]
    )
    @pytest.mark.parametrize(
        "folder", ["ground_truth/spot", "masks/spot", "Ground_Truth/Spot", "GT/spot", "masks"]
    )
    def test_names(self, part, ending, folder):
        for i in range(3):
            write_mask(part / f"{folder}/00{i}{ending}.png")
        assert self.pairs(part) == {f"00{i}": [f"{folder}/00{i}{ending}.png"] for i in range(3)}

    def test_instances_are_united(self, part):
        for i in range(2):
            path = part / f"ground_truth/spot/000_mask_{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(GREY, 16 * i, axis=1)).save(path)
        pairs = self.pairs(part)["000"]
        assert pairs == ["ground_truth/spot/000_mask_0.png", "ground_truth/spot/000_mask_1.png"]
        decode = Decode((24, 32))
        mask = decode.mask(*(part / path for path in pairs))
        assert (mask == (DRAWN | np.roll(DRAWN, 16, axis=1))).all()
        sample = Sample(
            Path("a.png"), ANOMALOUS, part / pairs[0], "part", "test", "spot", "a", (), (part / pairs[1],)
        )
        assert (ImageSet([replace(sample, path=part / pairs[0])], decode, NORMALISE).mask(0) == mask).all()
        write_mask(part / "ground_truth/spot/000_mask_1.png", size=(10, 12))
        with pytest.raises(DatasetError, match="masks of one image, are 32 x 24 and 12 x 10"):
            decode.mask(*(part / path for path in pairs))

    def test_a_folder_of_instances_for_each_image(self, part):
        """As in MVTec LOCO AD."""
        for path in ("000/000.png", "000/001.png", "001/000.png"):
            write_mask(part / "ground_truth/spot" / path)
        assert {name: len(masks) for name, masks in self.pairs(part).items()} == {
            "000": 2,
            "001": 1,
            "002": 0,
        }

    def test_masks_of_good_images_are_no_alarm(self, part):
        write_mask(part / "ground_truth/good/000_mask.png", value=0)
        unused = unused_samples(FOLDER, part.parent, "part", list_folder(part.parent, "part"))
        assert unused.pictures == () and "1 masks of normal images in ground_truth/good" in unused.others

    def test_an_image_named_like_a_mask(self, part):
        write_image(part / "test/spot/seg_1.png", np.random.default_rng(8))
        write_mask(part / "ground_truth/spot/seg_1_mask.png")
        assert self.pairs(part)["seg_1"] == ["ground_truth/spot/seg_1_mask.png"]

    @pytest.mark.parametrize(("added", "message"), [
        (("masks/spot/000.png", "GT/spot/000.png"), "masks of spot are in .*GT/spot and in .*masks/spot"),
        (("masks/000.png", "test/dent/000.png"), "would share the mask"),
        (("test/spot/000_mask.png",), "000_mask.png would count as an image, .* of a mask of 000.png"),
        (("test/masks/000.png",), "test/masks would count as a kind of defect"),
        (("test/spot_mask/000.png",), "test/spot_mask would count as a kind of defect"),
        (("ground_truth/spot/000.png", "ground_truth/spot/000/0.png"), "have the same name"),
        (("ground_truth/spot/000_mask.png", "ground_truth/spot/000_gt.png"), "have the same name"),
        (("ground_truth/spot/000_mask_1.png", "ground_truth/spot/000_mask_1.bmp"), "have the same name"),
    ])  # fmt: skip
    def test_what_is_not_clear_is_refused(self, part, added, message):
        for path in added:
            write_mask(part / path)
        with pytest.raises(DatasetError, match=message):
            self.pairs(part)

    def test_a_label_may_have_defects(self, part):
        write_image(part / "test/label/000.png", np.random.default_rng(0))
        assert "label" in {s.defect for s in list_folder(part.parent, "part")}

    def test_what_matches_no_image_is_said(self, part):
        for i in range(6):
            write_mask(part / f"ground_truth/spot/{i + 2}_spot.png")
            write_image(part / f"test/dent/{i}.png", np.random.default_rng(i))
        row = check_category(FOLDER, part.parent, "part")
        assert "6 files in ground_truth/spot match no image (the mask of 000.png is 000.png or" in row.unused
        for i in range(9):
            write_mask(part / f"ground_truth/x{i}/a.png")
        row = check_category(FOLDER, part.parent, "part")
        assert row.unused.count("match no image") == 5 and "6 files in 6 more folders of masks" in row.unused


def test_no_dice_of_empty_masks(make_config):
    """All would be found, with nothing shown."""
    sample = Sample(Path("a.png"), ANOMALOUS, Path("a_mask.png"), "random", "test", "polyp", "a")
    maps, masks = np.zeros((2, 8, 8), np.float32), np.zeros((2, 8, 8), np.uint8)
    scores = Scores([sample] * 2, np.zeros(2), maps, masks, 1.0, kind="segmentation")
    found = results_by_category(scores, make_config().run)["random"]
    assert found["dsc"] is None and found["miou"] is None
    masks[0, :4] = 1
    assert results_by_category(scores, make_config().run)["random"]["dsc"] == 0.5
