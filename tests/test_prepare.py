"""scripts/prepare/: what is written from small originals, what stays untouched, and what mistakes say."""

import random
import re
from dataclasses import replace

import cv2
import numpy as np
import processes
import pytest
from fixtures import (
    COUNTS,
    write_aptos_originals,
    write_flat_polyps,
    write_isic_originals,
    write_polyp_originals,
)
from PIL import Image

import datasets.check
from datasets.images import read_image
from datasets.registry import SPECS, collect
from datasets.splits import check_disjoint
from datasets.transforms import Decode
from scripts.prepare import aptos as prepare_aptos
from scripts.prepare import contaminated as prepare_contaminated
from scripts.prepare import isic2018 as prepare_isic2018
from scripts.prepare import kolektor as prepare_kolektor
from scripts.prepare import polyp as prepare_polyp
from scripts.prepare import visa as prepare_visa
from utils.cli import run_command


class TestPreparation:
    def prepare(self, module, source, output, *flags):
        return run_command(module.main, ["--source", str(source), "--output", str(output), "--quiet", *flags])

    def snapshot(self, folder):
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}

    @pytest.fixture
    def aptos(self, tmp_path, monkeypatch):
        monkeypatch.setattr(prepare_aptos, "LABELLED", 9)
        monkeypatch.setattr(prepare_aptos, "TRAINED", 4)
        monkeypatch.setitem(SPECS, "aptos", replace(SPECS["aptos"], counts={}))
        return write_aptos_originals(tmp_path / "originals")

    def test_aptos(self, aptos, tmp_path, capfd):
        before, output = self.snapshot(aptos), tmp_path / "out"
        assert self.prepare(prepare_aptos, aptos, output) == 0
        assert "aptos: 4 training, 2 normal and 3 anomalous test images" in capfd.readouterr().out
        assert {p.name for p in (output / "test/ABNORMAL").iterdir()} == {"id0.png", "id3.png", "id6.png"}
        image = cv2.imread(str(output / "test/ABNORMAL/id0.png"))
        assert image.shape == (512, 512, 3)
        assert (image[:10] == 0).all() and image[
            200:300, 200:300
        ].min() > 30  # padded above; the disc is cut out
        assert self.snapshot(aptos) == before
        done = self.snapshot(output)
        (output / "test/ABNORMAL/id3.png").unlink()  # as if it had been stopped
        assert self.prepare(prepare_aptos, aptos, output) == 0
        again = self.snapshot(output)
        assert {p: content for p, (_, content) in again.items()} == {p: c for p, (_, c) in done.items()}
        assert sum(again[p][0] != done[p][0] for p in done) == 1  # only what was missing is written

    def test_aptos_split_is_the_shuffle_of_seed_1(self, aptos, tmp_path):
        self.prepare(prepare_aptos, aptos, tmp_path / "out")
        random.seed(1)
        normal = [f"id{i}.png" for i in range(9) if i % 3]
        random.shuffle(normal)
        assert {p.name for p in (tmp_path / "out/train/NORMAL").iterdir()} == set(normal[:4])

    def test_mistakes(self, aptos, tmp_path, capfd, monkeypatch):
        def error(source, output):
            assert self.prepare(prepare_aptos, source, output) == 1
            message = capfd.readouterr().err
            assert message.count("\n") == 1
            return message

        assert "originals" in error(aptos, aptos / "out") and not (aptos / "out").exists()
        assert f"train.csv is missing; did you mean --source {aptos}?" in error(tmp_path, tmp_path / "o")
        empty = aptos / "train_images"
        assert "train.csv is missing; download from https://www.kaggle.com" in error(empty, tmp_path / "o")
        Image.new("RGB", (60, 60)).save(aptos / "train_images/id2.png")
        assert "id2.png: nothing but darkness" in error(aptos, tmp_path / "o")
        (aptos / "train_images/id2.png").write_bytes(b"no image")
        assert "id2.png is no readable image" in error(aptos, tmp_path / "o")
        (aptos / "train_images/id1.png").unlink()
        assert "1 of 9 originals are missing, such as" in error(aptos, tmp_path / "o2")
        assert not (tmp_path / "o2").exists()
        monkeypatch.setattr(prepare_aptos, "LABELLED", 3662)
        assert "lists 9 images; that of the competition lists 3662" in error(aptos, tmp_path / "o2")

    def test_crop_of_a_photograph_that_is_cut_off(self):
        image = np.zeros((40, 100, 3), np.uint8)
        y, x = np.mgrid[:40, :100]
        image[(y - 20) ** 2 + (x - 50) ** 2 < 30**2] = 200  # wider than high
        crop = prepare_aptos.fundus_crop(image)
        side = 59 + 2 * 5  # of the square, in the photograph's pixels
        rows = np.flatnonzero((crop > 100).any(axis=(1, 2)))
        assert abs(len(rows) - 512 * 40 / side) < 512 * 2 / side  # nothing of the height is lost
        assert abs((rows[0] + rows[-1]) / 2 - 255.5) < 512 * 1.5 / side  # and it is in the middle

    def test_isic2018(self, tmp_path, monkeypatch, capfd):
        source = write_isic_originals(tmp_path / "originals")
        assert self.prepare(prepare_isic2018, source, tmp_path / "out") == 1
        assert "published are 6705 and 193" in capfd.readouterr().err
        monkeypatch.setattr(prepare_isic2018, "TRAINED", 3)
        monkeypatch.setattr(prepare_isic2018, "TESTED", 5)
        monkeypatch.setitem(SPECS, "isic2018", replace(SPECS["isic2018"], counts={"isic2018": (3, 2, 3)}))
        before = self.snapshot(source)
        assert self.prepare(prepare_isic2018, source, tmp_path / "out") == 0
        assert self.snapshot(source) == before
        name = "ISIC_V1.jpg"
        copy, original = (
            tmp_path / f"out/test/NORMAL/{name}",
            source / f"ISIC2018_Task3_Validation_Input/{name}",
        )
        assert copy.read_bytes() == original.read_bytes() and copy.stat().st_ino != original.stat().st_ino

    def test_visa(self, masters, tmp_path, monkeypatch):
        monkeypatch.setitem(SPECS, "visa", replace(SPECS["visa"], counts=COUNTS["visa"]))
        assert self.prepare(prepare_visa, masters["visa"], tmp_path / "out") == 0
        pairs = [collect(SPECS["visa"], root, "all") for root in (masters["visa"], tmp_path / "out")]
        for raw, made in zip(*pairs, strict=True):
            assert raw.path.read_bytes() == made.path.read_bytes() and raw.defect == made.defect
            if raw.mask_path:
                values = np.asarray(Image.open(made.mask_path))
                assert set(np.unique(values)) == {0, 255}
                assert np.array_equal(values > 0, np.asarray(Image.open(raw.mask_path)) > 0)

    def test_polyps(self, tmp_path, monkeypatch, capfd):
        source, output = write_polyp_originals(tmp_path / "originals"), tmp_path / "out"
        flags = ("--dataset", "clinicdb")
        assert self.prepare(prepare_polyp, source, output, *flags) == 1
        assert "found 40 images in" in capfd.readouterr().err
        release = replace(prepare_polyp.RELEASES["clinicdb"], number=40)
        monkeypatch.setitem(prepare_polyp.RELEASES, "clinicdb", release)
        counts = dict.fromkeys(("random", "sequence"), (0, 0, 4, 32, 4))
        monkeypatch.setitem(SPECS, "clinicdb", replace(SPECS["clinicdb"], counts=counts))
        before = self.snapshot(source)
        capfd.readouterr()
        assert self.prepare(prepare_polyp, source, output, *flags) == 0
        told = [line.split(": ", 1)[1] for line in capfd.readouterr().out.splitlines()]
        assert told == [f"{name}: 32 training, 4 validation and 4 test images" for name in counts]
        assert self.snapshot(source) == before
        samples = collect(SPECS["clinicdb"], output, "all")
        for category in ("random", "sequence"):
            part = {s.path.name: s.split for s in samples if s.category == category}
            assert len(part) == 40  # each image in one part
            assert [list(part.values()).count(x) for x in ("train", "validation", "test")] == [32, 4, 4]
            videos = {(int(name.split(".")[0]) - 1) // 4: set() for name in part}
            for name, split in part.items():
                videos[(int(name.split(".")[0]) - 1) // 4].add(split)
            together = all(len(splits) == 1 for splits in videos.values())
            assert together == (category == "sequence")
        for s in samples:
            assert np.array_equal(
                np.asarray(Image.open(s.path)) > 128, np.asarray(Image.open(s.mask_path)) > 0
            )
        (source / "sequences.csv").write_text("frame,sequence\n1,1\n")
        assert self.prepare(prepare_polyp, source, output, *flags) == 1
        assert "gives no sequence for 10.png" in capfd.readouterr().err
        (source / "sequences.csv").write_text("frame,sequence\n" + "".join(f"{i},1\n" for i in range(1, 41)))
        assert self.prepare(prepare_polyp, source, output, *flags) == 1
        assert "1 sequences are too few for three parts" in capfd.readouterr().err

    @pytest.fixture
    def flat(self, tmp_path, monkeypatch):
        """CVC-ColonDB as it is published, in small."""
        starts = {1: 1, 3: 2, 5: 3, 7: 4, 9: 5, 11: 6, 13: 9, 15: 8, 17: 10, 19: 7}
        release = replace(prepare_polyp.RELEASES["colondb"], number=20, starts=starts)
        release = replace(release, copies=((2, 4), (2, 11), (5, 6)))
        monkeypatch.setitem(prepare_polyp.RELEASES, "colondb", release)
        counts = {"random": (0, 0, 2, 16, 2)}
        monkeypatch.setitem(SPECS, "colondb", replace(SPECS["colondb"], counts=counts))
        return write_flat_polyps(tmp_path / "originals")

    def test_polyps_in_one_folder(self, flat, tmp_path, capfd):
        before, output = self.snapshot(flat), tmp_path / "out"
        assert self.prepare(prepare_polyp, flat, output, "--dataset", "colondb") == 0
        assert "random: 16 training, 2 validation and 2 test images" in capfd.readouterr().out
        assert self.snapshot(flat) == before
        samples = collect(SPECS["colondb"], output, "all")
        for category in ("random", "sequence"):
            part = {int(s.path.stem): s.split for s in samples if s.category == category}
            assert sorted(part) == list(range(1, 21))  # no mask and no contour among the frames
            copies = [(2, 4, 11), (5, 6)]
            assert all(len({part[n] for n in same}) == 1 for same in copies)
            if category == "sequence":  # a frame of 1, 2 and 6 is the same, so these stay together, too
                together = [(1, 2, 3, 4, 11, 12), (5, 6), (7, 8), (9, 10), (13, 14), (15, 16), (17, 18)]
                assert all(len({part[n] for n in same}) == 1 for same in together)
            own = [s for s in samples if s.category == category]
            check_disjoint(*([s for s in own if s.split == name] for name in ("train", "test")))
        for s in samples:
            image, mask = (np.asarray(Image.open(p).convert("L")) for p in (s.path, s.mask_path))
            assert np.array_equal(image > 200, mask > 0) and s.path.suffix in (".tif", ".tiff")

    def test_a_repackaged_copy_of_one_folder(self, flat, tmp_path, caplog):
        """Its frames have the release's sequences where its equal frames have the release's numbers."""
        for i in range(1, 21):
            for name, place in ((f"{i}.*", "images"), (f"p{i}.*", "masks")):
                (path,) = flat.glob(name)
                (flat / place).mkdir(exist_ok=True)
                path.rename(flat / place / f"{i}{path.suffix}")

        def splits():
            source = prepare_polyp.Source(flat, "")
            plan = prepare_polyp.plan(prepare_polyp.RELEASES["colondb"], source)
            return {item.target.split("/")[0] for item in plan}

        assert splits() == {"random", "sequence"} and caplog.text == ""
        for a, b in (("2", "x"), ("3", "2"), ("x", "3")):
            (path,) = (flat / "images").glob(f"{a}.*")
            path.rename(path.with_stem(b))
        assert splits() == {"random"} and "no split sequence: the frames are not numbered" in caplog.text

    def test_mistakes_in_one_folder(self, flat, tmp_path, capfd):
        def error():
            assert self.prepare(prepare_polyp, flat, tmp_path / "out", "--dataset", "colondb") == 1
            assert not (tmp_path / "out").exists()
            return capfd.readouterr().err

        flags = ("--dataset", "colondb")
        assert self.prepare(prepare_polyp, flat.parent, tmp_path / "out", *flags) == 1
        assert f"did you mean --source {flat}?" in capfd.readouterr().err
        (flat / "3.tiff").write_bytes(b"twice")
        assert "3.tif and 3.tiff have the same name" in error()
        (flat / "3.tiff").unlink()
        (flat / "p7.tiff").rename(flat / "7_mask.tiff")
        assert "1 of 40 originals are missing, such as" in (message := error()) and "p7.tiff" in message
        (flat / "7_mask.tiff").rename(flat / "p7.tiff")
        (flat / "8.tiff").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "1 of 40 originals were not fetched, such as" in (message := error())
        assert "8.tiff: a Git LFS pointer" in message
        (flat / "8.tiff").unlink()
        assert "found 19 images in" in error()

    def test_unreadable_originals_stop_before_anything_is_written(self, tmp_path, monkeypatch, capfd):
        source = write_polyp_originals(tmp_path / "originals")
        release = replace(prepare_polyp.RELEASES["clinicdb"], number=40)
        monkeypatch.setitem(prepare_polyp.RELEASES, "clinicdb", release)
        for path in (source / "Ground Truth").glob("*.png"):
            path.write_bytes(b"no image")
        assert self.prepare(prepare_polyp, source, tmp_path / "out", "--dataset", "clinicdb") == 1
        assert "is no readable image" in capfd.readouterr().err and not (tmp_path / "out").exists()

    def test_real_sequences(self, shared_data):
        """The tables of the program are those of the releases."""
        clinicdb, starts = shared_data / "cvc-clinicdb", prepare_polyp.CLINICDB_STARTS
        rows = prepare_polyp.Source(clinicdb, "").table("sequences.csv", ("frame", "sequence"))
        firsts = {}
        for row in rows:
            firsts.setdefault(int(row["sequence"]), int(row["frame"]))
        assert tuple(firsts[n] for n in sorted(firsts)) == starts and len(rows) == 612
        told = (shared_data / "originals/README.md").read_text()
        spans = re.findall(r"(\d+) to (\d+) (?:sequence|s\.) (\d+)", told)
        assert {int(a): int(n) for a, _, n in spans} == prepare_polyp.COLONDB_STARTS
        assert sum(int(b) - int(a) + 1 for a, b, _ in spans) == prepare_polyp.RELEASES["colondb"].number

    @pytest.mark.parametrize("name", ["clinicdb", "colondb"])
    def test_real_originals(self, shared_data, tmp_path, monkeypatch, capfd, name):
        """From files as published to images and masks of a run; ten of a few, by bytes behind them."""
        files = shared_data / f"originals/cvc-{name}"
        source, output, flags = tmp_path / "source", tmp_path / "out", ("--dataset", name)
        places = ("Original/{}.tif", "Ground Truth/{}.tif")
        if name == "colondb":
            places = ("{}.tiff", "p{}.tiff")
        for n in range(1, 11):
            original = {1: 242, 2: 245}.get(n, (1, 100)[n % 2]) if name == "colondb" else (1, 100)[n % 2]
            for place in places:
                path = source / place.format(n)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((files / place.format(original)).read_bytes() + bytes(max(n - 2, 0)))
        release = replace(prepare_polyp.RELEASES[name], number=10, starts={n: n for n in range(1, 11)})
        monkeypatch.setitem(prepare_polyp.RELEASES, name, release)
        counts = {"random": (0, 0, 1, 8, 1)} | ({"sequence": (0, 0, 1, 8, 1)} if name == "clinicdb" else {})
        monkeypatch.setitem(SPECS, name, replace(SPECS[name], counts=counts))
        assert self.prepare(prepare_polyp, source, output, *flags) == 0, capfd.readouterr().err
        assert run_command(datasets.check.main, [*flags, "--data-root", str(output)]) == 0
        for s in collect(SPECS[name], output, "random"):
            image, mask = read_image(s.path), Decode((288, 384), mask_threshold=0.5).mask(s.mask_path)
            assert image.size == ((384, 288) if name == "clinicdb" else (574, 500))
            assert np.asarray(image).std(axis=2).mean() > 5  # in colour
            assert 0.005 < mask.mean() < 0.5
            if name == "clinicdb":
                copy = shared_data / "cvc-clinicdb/Original" / f"{(1, 100)[int(s.path.stem) % 2]}.jpg"
                difference = np.asarray(image, float) - np.asarray(Image.open(copy), float)
                assert np.abs(difference).mean() < 3

    def test_splits_of_the_releases(self, tmp_path):
        """The counts of the datasets are those of the splits."""
        for name, folder, suffix in (("clinicdb", "Original", "tif"), ("colondb", "", "tiff")):
            release = prepare_polyp.RELEASES[name]
            base = tmp_path / name / folder
            base.mkdir(parents=True)
            (tmp_path / name / release.masks).mkdir()
            for n in range(1, release.number + 1):
                (base / f"{n}.{suffix}").write_text(f"{n:04}")
            items = prepare_polyp.plan(release, prepare_polyp.Source(tmp_path / name, ""))
            for category, counts in SPECS[name].counts.items():
                targets = [i.target for i in items if i.target.startswith(f"{category}/")]
                found = [sum(t.split("/")[1:3] == [part, "images"] for t in targets) for part in
                         ("test", "train", "validation")]  # fmt: skip
                assert tuple(found) == counts[2:], (name, category)

    def test_kolektor_beside_others(self, masters, tmp_path, monkeypatch):
        monkeypatch.setitem(SPECS, "kolektor", replace(SPECS["kolektor"], counts=COUNTS["kolektor"]))
        monkeypatch.setattr(prepare_kolektor, "KOLEKTOR", SPECS["kolektor"])
        assert self.prepare(prepare_kolektor, masters["kolektor"], tmp_path / "out/kolektor") == 0
        made = collect(SPECS["folder"], tmp_path / "out", "kolektor")
        raw = collect(SPECS["kolektor"], masters["kolektor"], "kolektor")

        def key(s):
            return s.path.read_bytes(), s.split, s.label, s.mask_path and s.mask_path.read_bytes()

        kept = [s for s in raw if s.split == "test" or s.path.parent.name != "kos26"]  # a copy of kos01
        assert sorted(map(str, map(key, made))) == sorted(map(str, map(key, kept)))

    def test_contaminated_training_with_a_folder_of_masks_for_each_image(self, tmp_path):
        """As MVTec LOCO has them: each mask goes with its own image."""
        source, shade = tmp_path / "part", iter(range(256))
        for folder, count in {"train/good": 20, "test/good": 1, "test/cut": 6}.items():
            for i in range(count):
                path = source / folder / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((9, 9), next(shade), np.uint8)).save(path)
                for n in range(2) if folder == "test/cut" else ():
                    mask = np.zeros((9, 9), np.uint8)
                    mask[i, n] = 255
                    path = source / f"ground_truth/cut/{i:03d}/{n:03d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)
        assert self.prepare(prepare_contaminated, source, tmp_path / "out/part", "--rate", "0.1") == 0
        samples = collect(SPECS["folder"], tmp_path / "out", "part")
        defects = [s for s in samples if s.split == "test" and s.label == 1]
        assert len(defects) == 2
        for sample in defects:
            row = int(sample.path.stem)
            assert sorted(int(np.asarray(Image.open(m))[row].argmax()) for m in sample.masks) == [0, 1]
            assert all(np.asarray(Image.open(m))[row].any() for m in sample.masks)

    def test_contaminated_training(self, tmp_path, capfd):
        source, shade = tmp_path / "part", iter(range(256))
        for folder, count in {"train/good": 20, "test/good": 3, "test/cut": 4, "test/dent": 2}.items():
            for i in range(count):
                path = source / folder / f"{i:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((9, 9), next(shade), np.uint8)).save(path)
                if folder in ("test/cut", "test/dent"):
                    mask = source / "ground_truth" / folder[5:] / f"{i:03d}_mask.png"
                    mask.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(mask)
        before, moved, tests = self.snapshot(source), {}, []
        for rate in (0.0, 0.1, 0.2):
            output = tmp_path / f"out/part-{rate}"
            assert self.prepare(prepare_contaminated, source, output, "--rate", str(rate)) == 0
            assert "20 training, 3 normal and 2 anomalous test images" in capfd.readouterr().out
            names = {p.name for p in (output / "train/good").iterdir()}
            moved[rate] = {name for name in names if name.startswith(("cut_", "dent_"))}
            assert len(moved[rate]) == round(20 * rate) and len(names) == 20
            tests.append(
                {p.relative_to(output) for p in output.glob("[tg]*t*/**/*.png") if "train" not in p.parts}
            )
        assert (
            moved[0.1] < moved[0.2] and tests[0] == tests[1] == tests[2] and self.snapshot(source) == before
        )
        left = {f"{p.parent.name}_{p.name}" for p in output.glob("test/*/*") if p.parent.name != "good"}
        assert not left & moved[0.2] and len(list(output.glob("ground_truth/*/*"))) == 2
        assert self.prepare(prepare_contaminated, source, output, "--rate", "0.1") == 1
        assert "is not of --rate 0.1; choose an empty --output" in capfd.readouterr().err
        assert self.prepare(prepare_contaminated, source, tmp_path / "no", "--rate", "0.3") == 2
        assert "choose a value between 0 and 0.2" in capfd.readouterr().err
        for path in (source / "test/cut").iterdir():
            path.unlink()
        assert self.prepare(prepare_contaminated, source, tmp_path / "no", "--rate", "0") == 1
        assert "2 defects and 20 training images; more than 4 defects are needed" in capfd.readouterr().err
        assert not (tmp_path / "no").exists()

    @pytest.mark.parametrize("name", ["aptos", "isic2018", "visa", "polyp", "kolektor"])
    def test_as_commands(self, name, tmp_path):
        flags = ["--dataset", "kvasir"] if name == "polyp" else []
        flags += ["--source", tmp_path, "--output", tmp_path / "out"]
        done = processes.run(f"scripts.prepare.{name}", *flags, cwd=tmp_path)
        assert done.returncode == 1 and "is missing; download from https://" in done.stderr
        assert done.stderr.count("\n") == 1
