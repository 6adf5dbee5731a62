"""scripts/prepare_*.py: what is written from small originals, what stays untouched, and what mistakes say."""

import random
import sys
from dataclasses import replace

import cv2
import numpy as np
import processes
import pytest
from conftest import ROOT
from fixtures import COUNTS, write_aptos_originals, write_isic_originals, write_polyp_originals
from PIL import Image

from datasets.build import SPECS
from datasets.samples import collect
from utils.cli import run_command

sys.path.insert(0, str(ROOT / "scripts"))
import prepare_aptos
import prepare_isic2018
import prepare_kolektor
import prepare_polyp
import prepare_visa


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
        assert "4 training, 2 normal and 3 anomalous test images" in capfd.readouterr().out
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
        assert "train.csv is missing; download from https://www.kaggle.com" in error(tmp_path, tmp_path / "o")
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
        monkeypatch.setitem(SPECS, "clinicdb", replace(SPECS["clinicdb"], counts={"random": (0, 0, 4, 32)}))
        before = self.snapshot(source)
        assert self.prepare(prepare_polyp, source, output, *flags) == 0
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

    @pytest.mark.parametrize("name", ["aptos", "isic2018", "visa", "polyp", "kolektor"])
    def test_as_commands(self, name, tmp_path):
        flags = ["--dataset", "kvasir"] if name == "polyp" else []
        flags += ["--source", tmp_path, "--output", tmp_path / "out"]
        done = processes.run(f"scripts/prepare_{name}.py", *flags, cwd=tmp_path)
        assert done.returncode == 1 and "is missing; download from https://" in done.stderr
        assert done.stderr.count("\n") == 1
