"""Every dataset on its layout in small: what is listed, what each kind of damage says, and one short run."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import ROOT, TINY
from fixtures import COUNTS, LAYOUTS, has_masks
from PIL import Image

import datasets.check
import train
from datasets.build import build_data
from datasets.images import read_mask
from datasets.loader import ImageSet
from datasets.registry import SPECS, collect
from datasets.samples import count
from datasets.splits import hold_out
from datasets.transforms import Decode, Normalise
from utils.cli import run_command
from utils.errors import DatasetError
from utils.layers import config_file, load_config

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EVERY = pytest.mark.parametrize("layout", LAYOUTS)
POLYPS = ("kvasir", "clinicdb", "colondb")  # no normal images


@pytest.fixture
def root(masters, layout, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(masters[layout], tmp_path / "data" / layout))


@pytest.fixture
def spec(layout, monkeypatch):
    """The layout's dataset, with the counts of the layout in small as published ones, everywhere."""
    name = layout.split("-")[0]
    spec = replace(SPECS[name], counts=COUNTS[layout], verified=True)
    monkeypatch.setitem(SPECS, name, spec)
    return spec


def config_of(spec, root, **settings):
    category = next(iter(spec.counts))
    chosen = {"run.data_root": str(root), "data.category": category, "data.image_size": 64} | settings
    return load_config(config_file(spec.name), chosen | {"data.name": spec.name}, category=category)


@EVERY
class TestListing:
    def test_counts_and_labels(self, root, spec):
        samples = collect(spec, root, "all")
        assert list(dict.fromkeys(s.category for s in samples)) == list(spec.counts)
        for category, expected in spec.counts.items():
            assert count([s for s in samples if s.category == category]) == expected
        for s in samples:
            assert (
                s.path.is_file()
                and s.path.suffix.lower() != ".tiff"
                and s.split in ("train", "validation", "test")
            )
            bright = (np.asarray(Image.open(s.path).convert("L")) > 200).any()
            assert s.label == int(bright), s.path
            assert (s.defect in ("good", "ok", "NORMAL", "normal")) == (s.label == 0)
        assert len({s.path for s in samples}) == len(samples)

    def test_masks_are_those_of_their_images(self, root, spec):
        config = config_of(spec, root)
        for s in collect(spec, root, "all"):
            assert (s.mask_path is not None) == (has_masks(spec) and s.label == 1)
            if s.mask_path is not None:
                image = np.asarray(Image.open(s.path).convert("L"))
                mask = Decode(image.shape, mask_threshold=config.data.mask_threshold).mask(s.mask_path)
                assert np.array_equal(image > 200, mask == 1), s.path

    def test_sets_of_a_run(self, root, spec):
        data = build_data(config_of(spec, root), NORMALISE)
        train_normal, test_normal, test_anomalous, *more = next(iter(spec.counts.values()))
        assert len(data.test) == test_normal + test_anomalous
        if spec.segmentation:
            assert len(data.train) == more[0] and len(data.validation) == 2
        else:
            assert len(data.train) == train_normal and data.validation is None
            assert all(s.label == 0 for s in data.train.samples)  # VAD's anomalous ones are left out
        batch = data.test.__getitems__(list(range(len(data.test))))
        shape = (2, 3, 64, 64) if spec.video else (3, 64, 64)
        assert batch["frames" if spec.video else "image"].shape == (len(data.test), *shape)
        assert batch["label"].sum() == test_anomalous
        if has_masks(spec) and not config_of(spec, root).data.frame_offset:
            assert batch["mask"].shape == (len(data.test), 1, 64, 64)
            assert [bool(m.any()) for m in batch["mask"]] == batch["label"].bool().tolist()
        else:
            assert "mask" not in batch


@EVERY
class TestDamage:
    def test_unreadable_image(self, root, spec):
        victim = next(s for s in collect(spec, root, "all") if s.split == "test" and s.label == 1)
        victim.path.write_bytes(b"\xff\xd8\xff half of it")
        with pytest.raises(DatasetError, match=f"{victim.path.name} is no readable image"):
            data = build_data(config_of(spec, root), NORMALISE)  # where a mask is compared with it
            data.test.__getitems__([[s.path for s in data.test.samples].index(victim.path)])

    @pytest.mark.parametrize(("split", "label"), [("train", 0), ("test", 0), ("test", 1)])
    def test_empty_split(self, root, spec, split, label):
        category = next(iter(spec.counts))
        victims = [s for s in collect(spec, root, category) if (s.split, s.label) == (split, label)]
        if spec.segmentation:
            shutil.rmtree(root / category / split / "images")
            (root / category / split / "images").mkdir()
            with pytest.raises(DatasetError, match=f"no anomalous {split} image found"):
                collect(spec, root, category)
            return
        if spec.video:
            intervals = {("train", 0): None, ("test", 0): "[1:4]", ("test", 1): "[9:9]"}[split, label]
            if intervals is None:
                shutil.rmtree(root / "Train")
                (root / "Train/Train001").mkdir(parents=True)
            else:
                file = root / "Test/UCSDped2.m"
                file.write_text(file.read_text().replace("[2:3]", intervals).replace("[1:2]", intervals))
        csv = root / "split_csv/1cls.csv"
        if csv.is_file():
            gone = {s.path.relative_to(root).as_posix() for s in victims}
            lines = csv.read_text().splitlines(keepends=True)
            csv.write_text("".join(line for line in lines if not gone & set(line.split(","))))
        elif not spec.video:
            for s in victims:
                s.path.unlink()
        kind = ("normal", "anomalous")[label]
        message = f"no {kind} (training|test) image" if split == "test" else "no normal training image"
        with pytest.raises(DatasetError, match=message):
            collect(spec, root, category)

    def test_a_test_image_that_was_trained_on(self, root, spec, caplog):
        samples = collect(spec, root, next(iter(spec.counts)))
        label = int(spec.segmentation)
        ours = next(s for s in samples if s.split == "train" and s.label == label)
        theirs = next(s for s in samples if s.split == "test" and s.label == label)
        shutil.copyfile(ours.path, theirs.path)
        if spec.drops_copies:  # as its release is known for it
            data = build_data(config_of(spec, root), NORMALISE)
            assert ours.path not in {s.path for s in data.train.samples}
            assert len(data.train) == next(iter(spec.counts.values()))[3 if spec.segmentation else 0] - 1
            assert "1 training images are also in the test set" in caplog.text
        else:
            message = rf"{theirs.path.name} of the test set is the same file as .*{ours.path.name}"
            with pytest.raises(DatasetError, match=message):
                build_data(config_of(spec, root), NORMALISE)

    def test_wrong_root(self, root, spec):
        deeper = next(p for p in sorted(root.iterdir()) if p.is_dir())
        for wrong in (root.parent, deeper, root.parent.parent):  # one level up, one down, two up
            with pytest.raises(DatasetError) as error:
                collect(spec, wrong, "all")
            assert f"did you mean --data-root {root}?" in str(error.value)
            assert f"does not look like {spec.name}: expected {spec.layout} in it" in str(error.value)

    def test_counts(self, root, spec, caplog):
        victim = next(s for s in collect(spec, root, "all") if s.split == "train")
        if (root / "split_csv").is_dir():
            csv = root / "split_csv/1cls.csv"
            name = victim.path.relative_to(root).as_posix()
            csv.write_text("".join(x for x in csv.read_text().splitlines(keepends=True) if name not in x))
        else:
            victim.path.unlink()
        with pytest.raises(DatasetError, match=r"has \d.* training, .*; published are \d.*Complete the copy"):
            collect(spec, root, "all")
        assert not caplog.records
        assert collect(replace(spec, verified=False, verified_total=False), root, "all")
        assert "published are" in caplog.text and "this is not the official split" in caplog.text
        assert collect(replace(spec, counts={}), root, "all")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if has_masks(SPECS[name.split("-")[0]])])
def test_missing_mask(root, spec):
    victim = next(s for s in collect(spec, root, "all") if s.mask_path)
    victim.mask_path.unlink()
    with pytest.raises(
        DatasetError,
        match=r"no mask for .*; expected .*\. Complete the copy, or take .* with --skip-unreadable",
    ):
        collect(spec, root, "all")


class TestSingleDatasets:
    @pytest.mark.parametrize("layout", ["kolektor"])
    def test_kolektor_split_and_groups(self, root, spec):
        samples = collect(spec, root, "kolektor")
        train_items = {s.path.parent.name for s in samples if s.split == "train"}
        assert train_items == {"kos01", "kos02", "kos26"}
        assert {s.path.parent.name for s in samples if s.split == "test" and s.label == 0} == {
            "kos36",
            "kos50",
        }
        groups = {s.path.parent.name: s.group for s in samples}
        assert groups["kos26"] == groups["kos01"] != groups["kos02"]
        training = [s for s in samples if s.split == "train"]
        for seed in range(4):
            kept, held = hold_out(training, 0.3, seed=seed)
            assert held and not {s.path.read_bytes() for s in kept} & {s.path.read_bytes() for s in held}

    @pytest.mark.parametrize("layout", ["kolektor"])
    @pytest.mark.parametrize("added", ["Part0_label.tif", "Part0.png"])
    def test_kolektor_pairs_that_are_not_clear(self, root, spec, added, tmp_path):
        copy = shutil.copytree(root, tmp_path / "copy")
        shutil.copy(copy / "kos02/Part0.jpg", copy / "kos02" / added)
        with pytest.raises(DatasetError, match="have the same name"):
            collect(spec, copy, "kolektor")

    @pytest.mark.parametrize("layout", ["kolektor"])
    def test_kolektor_folder_names(self, root, spec):
        (root / "kos01").rename(root / "kos1a")
        with pytest.raises(DatasetError, match="folder kos1a is no commutator"):
            collect(spec, root, "kolektor")

    @pytest.mark.parametrize("layout", ["oct2017"])
    def test_oct_groups_are_patients_and_its_nested_folder(self, root, spec):
        samples = collect(spec, root, "oct2017")
        assert {s.group for s in samples if s.split == "train"} == {"0000000", "0000001", "0000002"}
        assert {s.split for s in samples if s.group == "0000010"} == {"test"}
        root.rename(root.parent / "OCT2017 ")  # with a space at the end, as it comes
        with pytest.raises(DatasetError, match=r"did you mean --data-root '.*/OCT2017 '\?"):
            collect(spec, root.parent, "oct2017")

    @pytest.mark.parametrize("layout", ["vad"])
    def test_vad_defects(self, root, spec):
        samples = collect(spec, root, "vad")
        assert {s.defect for s in samples if s.split == "test"} == {"good", "bad", "bad_unseen_defects"}
        (root / "train/bad/000.png").unlink()
        with pytest.raises(
            DatasetError, match=r"6 \(and 1 anomalous\) training.* are 6 \(and 2 anomalous\) training, 3"
        ):
            collect(spec, root, "vad")

    @pytest.mark.parametrize("layout", ["visa"])
    def test_visa_split_file(self, root, spec):
        csv = root / "split_csv/1cls.csv"
        text = csv.read_text()
        for old, new, message in (
            ("object,split", "object,part", "must have the columns"),
            ("candle/Data/Images/Normal/002", "../candle/002", "is outside of"),
            ("candle/Data/Images/Normal/002", "candle/Data/Images/Normal/999", "Normal/999.*is missing"),
            (",candle/Data/Masks/Anomaly/000.png", ",", "gives no mask for"),
        ):
            csv.write_text(text.replace(old, new))
            with pytest.raises(DatasetError, match=message):
                collect(spec, root, "all")

    @pytest.mark.parametrize("layout", ["visa"])
    def test_visa_order_is_that_of_the_prepared_layout(self, root, spec, masters):
        parts = [collect(spec, r, "pcb1") for r in (root, masters["visa-prepared"])]
        release, prepared = ([(s.split, s.defect) for s in part] for part in parts)
        assert release == prepared


class TestRealImages:
    def test_kolektor(self, shared_data):
        root = shared_data / "kolektor"
        config = config_of(SPECS["kolektor"], root)
        data = build_data(config, NORMALISE)  # no image is on both sides
        assert (len(data.train), len(data.test), sum(s.label for s in data.test.samples)) == (244, 155, 52)
        copies = {s.group for s in data.train.samples if s.path.parent.name in ("kos01", "kos26")}
        assert copies == {"kos01"}
        full = ImageSet(data.test.samples, Decode((640, 256)), NORMALISE)
        batch = full.__getitems__([i for i, s in enumerate(full.samples) if s.label == 1][:5])
        assert batch["image"].shape == (5, 3, 640, 256) and batch["mask"].flatten(1).any(1).all()

    def test_mvtec(self, shared_data):
        data = build_data(
            config_of(SPECS["mvtec"], shared_data / "mvtec", **{"data.category": "bottle"}), NORMALISE
        )
        assert (len(data.train), len(data.test)) == (209, 83)

    def test_check_command(self, shared_data, capfd):
        flags = ["--dataset", "mvtec", "--data-root", str(shared_data / "mvtec")]
        assert run_command(datasets.check.main, flags) == 0
        assert "screw       320/41/119  320/41/119  ok" in capfd.readouterr().out


class TestCheckCommand:
    @pytest.fixture
    def check(self, capfd):
        def call(name, root):
            code = run_command(datasets.check.main, ["--dataset", name, "--data-root", str(root)])
            return code, *capfd.readouterr()

        return call

    @pytest.fixture
    def layout(self):
        return "btad"

    def test_as_published(self, check, spec, root):
        code, out, err = check("btad", root)
        assert code == 0 and out.count("5/2/3  5/2/3      ok") == 2 and err == ""

    def test_every_category_is_told(self, check, spec, root):
        (root / "01/test/ok/000.bmp").unlink()
        shutil.copytree(root / "03", root / "02")
        code, out, err = check("btad", root)
        rows = [line.split() for line in out.splitlines()[:4]]
        assert rows[1:] == [
            ["01", "5/1/3", "5/2/3", "differs"],
            ["02", "5/2/3", "-", "nothing", "published"],
            ["03", "5/2/3", "5/2/3", "ok"],
        ]
        assert code == 1 and "error: 1 of 3 categories are damaged or not as published: 01" in err

    def test_damage_and_missing(self, check, spec, root):
        shutil.rmtree(root / "03")
        (root / "01/ground_truth/ko/000.png").unlink()
        code, out, _ = check("btad", root)
        assert code == 1 and "damaged" in out and "missing" in out and "01: no mask for" in out

    def test_unverified_counts_are_no_failure(self, check, root):
        code, out, _ = check("btad", root)  # against the real numbers
        assert code == 0 and out.count("unverified: differs") == 2 and "399/30/200   missing" in out

    def test_copies_and_wrong_use(self, check, spec, root, capfd):
        shutil.copy(root / "01/train/ok/000.bmp", root / "01/test/ok/000.bmp")
        code, out, _ = check("btad", root)
        assert code == 1 and "is the same file as" in out
        code, _, err = check("btad", root / "01")
        assert code == 1 and "did you mean" in err and err.count("\n") == 1

    @pytest.mark.slow
    def test_as_a_module(self, root):
        assert processes.run("datasets.check", "--dataset", "btad", "--data-root", root).returncode == 0


class TestMaskFiles:
    def test_palettes_hold_labels(self, tmp_path):
        values = np.zeros((10, 10), np.uint8)
        values[2, 3] = 1
        mask = Image.fromarray(values, mode="P")
        mask.putpalette([0, 0, 0, 1, 0, 0])  # so dark that its brightness rounds to nothing
        mask.save(tmp_path / "p.png")
        assert (
            read_mask(tmp_path / "p.png").drawn.any() and Decode((10, 10)).mask(tmp_path / "p.png").sum() == 1
        )
        Image.fromarray(np.dstack([values * 0, values * 0 + 255]), mode="LA").save(tmp_path / "la.png")
        assert not read_mask(tmp_path / "la.png").drawn.any()
        assert Decode((10, 10)).mask(tmp_path / "la.png").shape == (10, 10)

    def test_crop_as_a_share(self, tmp_path):
        Image.fromarray(np.arange(160, dtype=np.uint8).reshape(8, 20)).save(tmp_path / "x.png")
        crop = Decode((4, 10), center_crop=0.5).image(tmp_path / "x.png")[..., 0]
        assert np.array_equal(crop, np.arange(160).reshape(8, 20)[2:6, 5:15])


def test_every_dataset_has_a_config_and_a_script():
    for name in SPECS:
        assert load_config(config_file(name), {"data.name": name}).data.name == name
        if name not in ("folder", "demo"):
            call = ["bash", str(ROOT / f"scripts/datasets/{name}.sh")]
            done = subprocess.run(call, capture_output=True, text=True)
            assert done.returncode == 2 and f"usage: bash scripts/datasets/{name}.sh DATA_ROOT" in done.stderr


RUNS = [
    *((layout, "paper") for layout in LAYOUTS),
    ("mvtec3d", "released"),
    ("isic2018", "released"),
    ("clinicdb", "released"),
    ("ped2", "released"),
]


@pytest.mark.parametrize(("layout", "flavor"), RUNS)  # released: where it reads the images in another way
def test_a_short_run(root, spec, flavor, tmp_path, capfd):
    flags = [
        "--dataset", spec.name, "--data-root", str(root), "--quiet",
        "--output", str(tmp_path / "runs"), "--category", next(iter(spec.counts)), "--flavor", flavor,
        "--backbone", TINY, "--iterations", "1", "--device", "cpu", "--precision", "fp32",
        "--set", "data.image_size=64", "--weights", "random", "--set", "model.width=0.5",
        "--set", "train.batch_size=2",
    ]  # fmt: skip
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine
    assert run_command(train.main, flags) == 0, capfd.readouterr().err
    (path,) = (tmp_path / "runs").glob("*/*/*/*/metrics.json")
    category, counts = next(iter(spec.counts.items()))
    result = json.loads(path.read_text())["results"][category]
    assert (result["n_normal"], result["n_anomalous"]) == counts[1:3]
    known = has_masks(spec) and (spec.name, flavor) != ("ped2", "paper")  # its maps are of an earlier frame
    assert (result["pixel_auroc"] is not None) == known
    if spec.segmentation:
        assert result["image_auroc"] is None and 0 <= result["miou"] <= result["dsc"] <= 1
    else:
        assert 0 <= result["image_auroc"] <= 1
    assert ("frame_auroc_macro_smoothed" in result) == (path.parent / "clips.png").is_file() == spec.video
