"""Datasets as people have them: wrong roots, incomplete copies, files not fetched, other layouts."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from fixtures import COUNTS, LAYOUTS, has_masks, write_layout, write_ped2
from PIL import Image
from scipy.io import savemat

import datasets.check
from datasets.build import list_samples, new_samples
from datasets.files import natural_order
from datasets.images import UnreadableImageError, read_image
from datasets.loader import ImageSet
from datasets.registry import SPECS, collect, find_root
from datasets.samples import count
from datasets.splits import first_copies
from datasets.transforms import Decode, Normalise
from datasets.video import FrameSet, list_ped2, warn_of_gaps, with_earlier_frames
from utils.cli import run_command
from utils.errors import DatasetError
from utils.layers import config_file, load_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064}\nsize 860000\n"
NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NAMES = {layout: layout.split("-")[0] for layout in LAYOUTS}


@pytest.fixture
def copy(masters, tmp_path):
    return lambda layout: Path(shutil.copytree(masters[layout], tmp_path / "data" / layout))


@pytest.fixture
def official(monkeypatch):
    """The layouts' counts as the published ones."""
    for layout, counts in COUNTS.items():
        spec = replace(SPECS[NAMES[layout]], counts=counts)
        monkeypatch.setitem(SPECS, NAMES[layout], spec)


def samples_of(name, root, **settings):
    """As a run takes them."""
    chosen = {"run.data_root": str(root), "data.category": "all"} | settings
    return list_samples(load_config(config_file(name), chosen | {"data.name": name}))


class TestRoots:
    @pytest.mark.parametrize("name", [name for name in SPECS if name not in ("folder", "demo")])
    def test_another_dataset_is_named(self, masters, name):
        """Each dataset on the root of each other one: refused with the right name, unless they look alike."""
        alike = [("aptos", "isic2018"), ("kvasir", "clinicdb", "colondb")]
        for layout, root in masters.items():
            there = NAMES[layout]
            if there == name or any(name in group and there in group for group in alike):
                continue
            with pytest.raises(DatasetError) as error:
                find_root(SPECS[name], root)
            found = str(error.value).split("it looks like ")[1].split(",")[0]
            assert found == there or any({found, there} <= set(group) for group in alike), (layout, found)
            assert f"--dataset {found}" in str(error.value)

    def test_mvtec_3d(self, masters, tmp_path):
        with pytest.raises(DatasetError, match="looks like mvtec3d, so use --dataset mvtec3d"):
            samples_of("mvtec", masters["mvtec3d"])
        shutil.copytree(masters["mvtec3d"] / "dowel", tmp_path / "own/dowel2")  # a name that is not published
        with pytest.raises(DatasetError, match="looks like mvtec3d"):
            samples_of("mvtec", tmp_path / "own")

    def test_scenes_of_mvtec_ad2(self, copy):
        """Images of one object under several lights stay together; private ones are no samples."""
        root = copy("mvtec_ad2")
        shutil.copy(
            root / "can/test_public/bad/001_regular.png", root / "can/test_public/bad/000_shift_1.png"
        )
        mask = root / "can/test_public/ground_truth/bad/001_regular_mask.png"
        shutil.copy(mask, mask.with_name("000_shift_1_mask.png"))
        samples = SPECS["mvtec_ad2"].list_samples(root, "can")
        scenes = {s.path.name: s.group for s in samples if s.label == 1}
        assert scenes["000_shift_1.png"] == scenes["000_regular.png"] == "can/test_public/bad/000"
        assert len({s.group for s in samples}) == len(samples) - 1 == 10
        assert {s.path.parent.name for s in samples} == {"good", "bad"}

    def test_regions_of_mvtec_loco(self, copy):
        """All masks in the folder of an image are its masks."""
        root = copy("mvtec_loco")
        folder = root / "pushpins/ground_truth/logical_anomalies/001"
        shutil.copy(folder / "000.png", folder / "001.png")
        samples = SPECS["mvtec_loco"].list_samples(root, "pushpins")
        masks = {s.path.relative_to(root / "pushpins/test").as_posix(): s.masks for s in samples if s.masks}
        assert sorted(masks) == [
            "logical_anomalies/000.png", "logical_anomalies/001.png", "structural_anomalies/000.png",
        ]  # fmt: skip
        assert masks["logical_anomalies/001.png"] == (folder / "000.png", folder / "001.png")

    def test_own_names_are_allowed(self, masters, tmp_path):
        shutil.copytree(masters["visa-prepared"] / "pcb1", tmp_path / "own/board")
        assert find_root(SPECS["mvtec"], tmp_path / "own") == tmp_path / "own"
        folder = find_root(SPECS["folder"], masters["visa-prepared"])  # a changed copy
        assert folder == masters["visa-prepared"]

    def test_ucsd(self, copy, tmp_path):
        """The root of the release has Ped1 first, in the same folders."""
        second = copy("ped2").rename(tmp_path / "data/UCSDped2")
        first = Path(shutil.copytree(second, tmp_path / "data/UCSDped1"))
        (first / "Test/UCSDped2.m").rename(first / "Test/UCSDped1.m")
        for root in (tmp_path / "data", first):
            with pytest.raises(DatasetError, match="UCSDped2.m .*did you mean --data-root .*/data/UCSDped2"):
                samples_of("ped2", root)

    @pytest.mark.parametrize(
        ("layout", "needed"),
        [
            ("btad", "*/train/ok"),
            ("visa", "split_csv/1cls.csv"),
            ("visa", "*/Data/Images/Normal"),
            ("visa-prepared", "*/train/good"),
            ("mvtec3d", "*/train/good/rgb"),
            ("mvtec_ad2", "*/test_public"),
            ("mvtec_loco", "*/test/logical_anomalies"),
            *(("vad", f"{split}/{kind}") for split in ("train", "test") for kind in ("good", "bad")),
            ("kolektor", "*/Part*.jpg"),
            ("kolektor", "*/Part*_label.*"),
            *(("aptos", f"{part}") for part in ("train/NORMAL", "test/NORMAL", "test/ABNORMAL")),
            *(("oct2017", f"test/{kind}") for kind in ("NORMAL", "CNV", "DME", "DRUSEN")),
            ("kvasir", "*/train/images"),
            ("kvasir", "*/test/images"),
            *(("ped2", part) for part in ("Train/Train001", "Test/Test001", "Test/UCSDped2.m")),
        ],
    )
    def test_what_the_message_names_is_asked_for(self, copy, layout, needed):
        root, spec = copy(layout), SPECS[NAMES[layout]]
        assert spec.list_categories(root)
        for path in root.glob(needed):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert not spec.list_categories(root)
        named = spec.layout.replace("{", "").replace("}", "")
        assert all(part.strip("*") in named for part in needed.split("/")[-1].split("_label")), named


class TestIncomplete:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_missing_images(self, copy, official, layout, caplog):
        """The message names ways out, and the first of them works."""
        root, name = copy(layout), NAMES[layout]
        spec = replace(SPECS[name], verified=True)
        victim = next(s for s in collect(spec, root, "all") if s.split == "test")
        victim.path.unlink()
        with pytest.raises(DatasetError, match=r"Complete the copy, or take .* --skip-unreadable") as error:
            collect(spec, root, "all")
        assert error.value.args[0].count("\n") == 0
        samples, skipped = samples_of(name, root, **{"run.skip_unreadable": True, "data.frame_offset": 0})
        assert victim.path not in {s.path for s in samples} and len(skipped) == (layout == "visa")
        assert "this is not the official split" in caplog.text
        also = "or use --dataset folder" in str(error.value)
        assert also == (layout in ("visa-prepared", "vad", "mvtec_loco"))
        if also:
            assert samples_of("folder", root)

    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if has_masks(SPECS[NAMES[layout]])])
    def test_missing_masks(self, copy, official, layout, caplog):
        root, name = copy(layout), NAMES[layout]
        victim = next(s for s in collect(SPECS[name], root, "all") if s.mask_path and s.split == "test")
        victim.mask_path.unlink()
        match = rf"no mask for \S*{victim.path.name}; expected .*--skip-unreadable"
        with pytest.raises(DatasetError, match=match):
            samples_of(name, root)
        samples, skipped = samples_of(name, root, **{"run.skip_unreadable": True, "data.frame_offset": 0})
        assert victim.path not in {s.path for s in samples} and len(skipped) == 1
        assert {s.label for s in samples if s.split == "train"} <= {0, int(SPECS[name].segmentation)}

    @pytest.mark.parametrize(("layout", "split"), [("isic2018", "train"), ("aptos", "test"), ("kvasir", "")])
    def test_a_slice_is_refused(self, copy, official, layout, split, caplog):
        """Counts that may be split in another way still have a known sum."""
        root, name = copy(layout), NAMES[layout]
        parts = [p for p in root.rglob("[0-9]*") if p.parent.name in ("NORMAL", "images")]
        images = [p for p in parts if split in p.parent.parent.name]
        for path in images[::2]:
            path.unlink()
        with pytest.raises(DatasetError, match="has .* published are .*Complete the copy"):
            samples_of(name, root)
        assert "in order" not in caplog.text
        assert run_command(datasets.check.main, ["--dataset", name, "--data-root", str(root)]) == 1

    def test_another_split_of_all_images_is_allowed(self, copy, official, caplog):
        root = copy("isic2018")
        (root / "test/NORMAL/000.png").rename(root / "train/NORMAL/100.png")
        assert len(samples_of("isic2018", root)[0]) == 11
        assert "has 7 training, 2 normal" in caplog.text and "may be in order" in caplog.text

    def test_unknown_totals_are_not_called_in_order(self, copy, official, caplog):
        root = copy("btad")
        (root / "01/train/ok/000.bmp").unlink()
        assert samples_of("btad", root)
        assert "not the official split" in caplog.text and "in order" not in caplog.text


class TestNotFetched:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_git_lfs_pointers_are_named(self, copy, official, layout, capfd):
        root, name = copy(layout), NAMES[layout]
        category = next(iter(SPECS[name].counts))
        samples = [s for s in collect(SPECS[name], root, category) if s.split == "test"]
        for i, s in enumerate(samples):
            s.path.write_text(POINTER.format(i))
        with pytest.raises(DatasetError, match=rf"{len(samples)} images and masks were not fetched.*Git LFS"):
            samples_of(name, root)
        assert run_command(datasets.check.main, ["--dataset", name, "--data-root", str(root)]) == 1
        assert "a Git LFS pointer stands in place of the file" in capfd.readouterr().out

    @pytest.mark.parametrize("layout", ["kolektor", "clinicdb", "mvtec3d"])
    def test_masks(self, copy, official, layout):
        root, name = copy(layout), NAMES[layout]
        victim = next(s for s in collect(SPECS[name], root, "all") if s.mask_path)
        victim.mask_path.write_text(POINTER.format(1))
        with pytest.raises(DatasetError, match=rf"1 images .*{victim.mask_path.name}: a Git LFS pointer"):
            samples_of(name, root)

    def test_single_images(self, tmp_path):
        (tmp_path / "x.png").write_text(POINTER.format(1))
        with pytest.raises(UnreadableImageError, match="no readable image: .* a Git LFS pointer"):
            read_image(tmp_path / "x.png")


class TestCheckDecodes:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("kind", ["images", "masks"])
    def test_a_folder_that_cannot_be_read(self, copy, official, layout, kind, capfd):
        root, name = copy(layout), NAMES[layout]
        spec = SPECS[name]
        if kind == "masks" and not has_masks(spec):
            pytest.skip("no masks")
        for s in collect(spec, root, "all"):
            path = s.path if kind == "images" else s.mask_path
            if s.split == "test" and path is not None:
                path.write_text(f"no picture: {path}")
        code = run_command(datasets.check.main, ["--dataset", name, "--data-root", str(root)])
        out = capfd.readouterr().out
        assert code == 1 and "damaged" in out and "no PNG, JPEG, BMP, TIFF" in out

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_whole_sets_pass(self, masters, official, layout, capfd):
        code = run_command(
            datasets.check.main, ["--dataset", NAMES[layout], "--data-root", str(masters[layout])]
        )
        assert code == 0, capfd.readouterr().out


# --- video --------------------------------------------------------------------------------------------------


def write_frames(root, labels=None):
    """The clips of `write_ped2` in the layout of video prediction, frames from 000; gives back `root`."""
    write_ped2(root)
    for part, folder in (("Train", "training"), ("Test", "testing")):
        for clip in ("001", "002"):
            new = root / folder / "frames" / clip[1:]
            new.mkdir(parents=True)
            for i, path in enumerate(sorted((root / part / f"{part}{clip}").glob("*.tif"))):
                Image.open(path).save(new / f"{i:03d}.jpg", quality=95)
    for part in ("Train", "Test"):
        shutil.rmtree(root / part)
    return root


def cells(*intervals):
    """A cell array as MATLAB writes it: starts in the first row of each cell, ends in the second."""
    gt = np.empty((1, len(intervals)), object)
    for i, interval in enumerate(intervals):
        gt[0, i] = np.array(interval).T.reshape(2, -1)
    return gt


VECTOR = np.array([0, 1, 1, 0, 1, 1, 0, 0])


class TestPed2AsFrames:
    @pytest.mark.parametrize(
        ("name", "labels"),
        [
            ("ped2.mat", cells([2, 3], [1, 2])),
            ("ped2.mat", cells([[2, 2], [3, 3]], [1, 2])),
            ("ped2.mat", VECTOR[None]),
            ("frame_labels_ped2.npy", VECTOR),
            ("frame_labels_ped2.npy", VECTOR[None].astype(float)),
            ("testing/labels.npy", VECTOR.astype(bool)),
            ("../frame_labels_ped2.npy", VECTOR),
        ],
    )
    def test_labels(self, tmp_path, official, name, labels):
        root = write_frames(tmp_path / "data/ped2")
        if name.endswith(".npy"):
            np.save(root / name, labels)
        else:
            savemat(root / name, {"gt": labels})
        samples = collect(SPECS["ped2"], root, "all")
        assert count(samples) == (8, 4, 4)
        test = [s for s in samples if s.split == "test"]
        assert [s.label for s in test] == VECTOR.tolist()
        assert [s.label == 1 for s in test] == [(np.asarray(Image.open(s.path)) > 200).any() for s in test]
        assert all(s.mask_path is None for s in samples)
        assert len({s.group for s in samples}) == 4  # clip 01 of both parts
        planes = with_earlier_frames(samples, 1)
        assert all(p.parent == s.path.parent for s in planes for p in s.earlier)

    def test_mistakes(self, tmp_path, official):
        root = write_frames(tmp_path / "data/ped2")

        def error(labels=None, name="labels.npy", **kind):
            if labels is not None:
                np.save(root / name, labels, **kind)
            with pytest.raises(DatasetError) as caught:
                collect(SPECS["ped2"], root, "all")
            return str(caught.value)

        assert "no labels of the test frames; expected ped2.mat" in error()
        assert "has 7 numbers for 8 test frames" in error(VECTOR[:7])
        assert "expected 0 or 1 for each" in error(VECTOR * 3)
        assert "published are" in error(1 - VECTOR * np.arange(8) // 4)  # 1 for what is normal
        assert "cannot be read as labels" in error(np.array([[1], [1, 2]], object), allow_pickle=True)
        (root / "labels.npy").write_text(POINTER.format(1))
        assert "labels.npy holds no labels: a Git LFS pointer" in error()
        savemat(root / "ped2.mat", {"other": 1})
        assert "ped2.mat cannot be read as labels of test frames (KeyError" in error()
        savemat(root / "ped2.mat", {"gt": cells([0, 3], [1, 2])})
        assert "ped2.mat has an interval from frame 0; frames are counted from 1" in error()
        savemat(root / "ped2.mat", {"gt": cells([2, 3])})
        assert "ped2.mat has 1 intervals for 2 test clips" in error()

    def test_missing_frames_shift_no_label(self, tmp_path):
        """Labels go by the number of a frame, in either layout."""
        release = write_layout("ped2", tmp_path / "ped2")
        other = write_frames(tmp_path / "other")
        savemat(other / "ped2.mat", {"gt": cells([2, 3], [1, 2])})
        for root, pattern in ((release, "Test/Test001/*.tif"), (other, "testing/frames/01/*.jpg")):
            before = {s.path: (s.label, s.mask_path) for s in list_ped2(root, "ped2")}
            sorted(root.glob(pattern))[1].unlink()
            after = {s.path: (s.label, s.mask_path) for s in list_ped2(root, "ped2")}
            assert len(after) == len(before) - 1 and all(before[path] == after[path] for path in after)

    def test_real_frames(self, shared_data, tmp_path):
        """The release's labels and a vector of them in the other layout are the same."""
        root = tmp_path / "ped2"
        for part, folder in (("Train", "training"), ("Test", "testing")):
            (root / folder / "frames").mkdir(parents=True)
            for clip in (shared_data / "ped2" / part).glob(f"{part}[0-9][0-9][0-9]"):
                (root / folder / "frames" / clip.name[-2:]).symlink_to(clip)
        rows = (shared_data / "ped2/frame_labels.csv").read_text().splitlines()[1:]
        np.save(root / "labels.npy", np.array([int(row.split(",")[2]) for row in rows]))
        ours, theirs = (list_ped2(r, "ped2") for r in (root, shared_data / "ped2"))
        assert count(ours) == (2550, 362, 1648)
        assert [(s.label, s.path.name) for s in ours] == [(s.label, s.path.name) for s in theirs]


class TestFrameOrder:
    def test_natural_order(self, tmp_path):
        names = ["frame1.png", "frame2.png", "frame10.png", "frame010.png", "frame11b.png", "x.png"]
        paths = [tmp_path / name for name in sorted(names)]
        assert [p.name for p in sorted(paths, key=natural_order)] == [
            "frame1.png", "frame2.png", "frame010.png", "frame10.png", "frame11b.png", "x.png",
        ]  # fmt: skip

    def numbered(self, root):
        """The frames of `write_ped2`, frames 8 to 11 and without leading zeros."""
        root = write_layout("ped2", root)
        for clip in [*(root / "Train").iterdir(), *(root / "Test").iterdir()]:
            for i, path in enumerate(sorted(clip.glob("[0-9f]*")) if clip.is_dir() else ()):
                path.rename(clip / f"frame{i + 8}{path.suffix}")
        return root

    def test_clips_of_a_set(self, tmp_path, official):
        root, release = self.numbered(tmp_path / "ped2"), write_layout("ped2", tmp_path / "release")
        (root / "Test/UCSDped2.m").write_text(
            "x{end+1}.gt_frame = [9:10];\nx{end+1}.gt_frame = [8:9];"  # by their numbers
        )
        found, expected = (collect(SPECS["ped2"], r, "all") for r in (root, release))
        assert [p.name for p in (s.path for s in found[:4])] == [f"frame{i}.tif" for i in (8, 9, 10, 11)]
        for s, t in zip(with_earlier_frames(found, 1), with_earlier_frames(expected, 1), strict=True):
            pairs = ((s.path, t.path), *zip(s.earlier, t.earlier), (s.mask_path, t.mask_path))
            assert all(a is b is None or a.read_bytes() == b.read_bytes() for a, b in pairs)
            assert s.label == t.label

    def test_a_folder_to_predict(self, make_config, tmp_path):
        config = make_config(
            "configs/ped2.yaml", data__stack_frames=1, model__name="remind", run__data_root=str(ROOT)
        )
        files = [tmp_path / f"{i}.png" for i in range(8, 13)]
        samples = new_samples(sorted(files), tmp_path, config)
        assert [s.path for s in samples] == files
        assert samples[3].earlier == (files[1], files[2])

    def gaps(self, caplog, tmp_path, *names, **settings):
        caplog.clear()
        samples = [replace(self.sample, path=tmp_path / name, group="clip") for name in names]
        with caplog.at_level(logging.WARNING):
            warn_of_gaps(samples)
        return caplog.text

    @pytest.fixture(autouse=True)
    def _sample(self, masters):
        self.sample = list_ped2(masters["ped2"], "ped2")[0]

    def test_gaps(self, caplog, tmp_path):
        assert not self.gaps(caplog, tmp_path, "f9.png", "f11.png", "f10.png")
        assert not self.gaps(caplog, tmp_path, "cam2_0009_v3.png", "cam2_0010_v3.png")
        text = self.gaps(caplog, tmp_path, "f1.png", "f2.png", "f4.png", "f5.png", "f9.png")
        assert "2 places (f2.png is followed by f4.png in" in text
        for odd in (("f1.jpg", "f1.png"), ("a1.png", "b2.png"), ("a.png", "b.png"), ("1_9.png", "2_1.png")):
            assert "do not rise by one in 1 places" in self.gaps(caplog, tmp_path, *odd), odd

    def test_models_that_see_motion_warn(self, masters, caplog):
        samples = list_ped2(masters["ped2"], "ped2")
        few = [s for s in samples if s.path.name != "002.tif"]
        with_earlier_frames(samples, 1)
        FrameSet(ImageSet(few, Decode((8, 8)), NORMALISE), frame_offset=0)
        assert not caplog.records
        with_earlier_frames(few, 1)
        FrameSet(ImageSet(few, Decode((8, 8)), NORMALISE), frame_offset=1)
        assert caplog.text.count("001.tif is followed by 003.tif") == 2


class TestRealOriginals:
    def test_colondb_copies(self, shared_data):
        """Two of the frames are one picture, so a split that draws frames must keep them together."""
        folder = shared_data / "originals/cvc-colondb"
        first = first_copies(sorted(folder.glob("[0-9]*.tiff")))
        assert first[folder / "245.tiff"] == folder / "242.tiff"
