"""--skip-unreadable, files with odd names, and outputs that overwrite no image: the commands as a whole."""

import csv
import os

import numpy as np
import pytest
from conftest import TINY, write_image
from image_cases import PHOTO, encoded
from test_images import SEEDS

import predict as predict_command
import test as test_command
import train as train_command
from datasets.check import filter_unreadable
from datasets.samples import UNKNOWN, Sample
from utils.cli import run_command

FLAGS = [
    "--category", "part", "--precision", "fp32", "--device", "cpu", "--quiet", "--model", "memory-bank",
    "--backbone", TINY, "--set", "data.image_size=64",
    "--weights", "random",
]  # fmt: skip
NAMES = ["two words.png", "o'quote\".png", "a,b.png", "new\nline.png", "größe-部.png", "<b>&.png", "same.bmp"]


@pytest.fixture
def call(mvtec_like, tmp_path, capfd):
    """Run a command: (exit code, stdout, stderr)."""

    def call(command, *flags):
        if command is train_command:
            flags = (
                "--data-root",
                str(mvtec_like),
                "--output",
                str(tmp_path / "runs"),
                "--name",
                "r",
                *flags,
            )
            flags += tuple(FLAGS)
        return run_command(command.main, [str(f) for f in flags]), *capfd.readouterr()

    return call


class TestSkipping:
    @pytest.fixture
    def damaged(self, mvtec_like):
        part = mvtec_like / "part"
        (part / "train/good/001.PNG").write_bytes(b"")
        (part / "test/good/000.png").write_bytes(b"text")
        (part / "ground_truth/spot/001_mask.png").write_bytes(b"text")
        return part

    def test_train_and_test(self, call, damaged, tmp_path):
        code, _, err = call(train_command, "--config", "configs/mvtec.yaml")
        assert (
            code == 1 and err.count("\n") == 1 and "no readable image" in err and "001_mask.png" in err
        )  # masks come first
        code, _, err = call(
            train_command, "--config", "configs/mvtec.yaml", "--skip-unreadable", "--overwrite"
        )
        assert code == 0 and "not the official split of mvtec" in err and "001.PNG: the file is empty" in err
        run = tmp_path / "runs/mvtec/one-class/part/r"
        rows = list(csv.DictReader((run / "skipped.csv").open()))
        names = ["train/good/001.PNG", "test/good/000.png", "ground_truth/spot/001_mask.png"]
        assert [r["path"] for r in rows] == [f"part/{n}" for n in names] and all(r["reason"] for r in rows)
        assert len(list(csv.DictReader((run / "scores.csv").open()))) == 7
        code, _, _ = call(test_command, "--checkpoint", run, "--quiet", "--device", "cpu")
        assert code == 0 and (run / "test/skipped.csv").is_file()  # as the run did
        (damaged / "train/good/001.PNG").unlink()
        for path in ("test/good/000.png", "ground_truth/spot/001_mask.png"):
            write_image(damaged / path, np.random.default_rng(1))
        code, _, _ = call(test_command, "--checkpoint", run, "--quiet", "--device", "cpu", "--overwrite")
        assert code == 0 and not (run / "test/skipped.csv").exists()

    def test_test_alone(self, call, mvtec_like, tmp_path):
        assert call(train_command, "--config", "configs/mvtec.yaml")[0] == 0
        (mvtec_like / "part/test/good/000.png").write_bytes(b"text")
        flags = ("--checkpoint", tmp_path / "runs/mvtec/one-class/part/r", "--quiet", "--device", "cpu")
        code, _, err = call(test_command, *flags)
        assert code == 1 and "000.png is no readable image" in err and err.count("\n") == 1
        code, _, err = call(test_command, *flags, "--skip-unreadable")
        assert code == 0 and "000.png" in err and "not the official split" in err

    def test_nothing_is_left(self, call, mvtec_like):
        for path in (mvtec_like / "part/train/good").iterdir():
            path.write_bytes(b"")
        code, _, err = call(train_command, "--config", "configs/mvtec.yaml", "--skip-unreadable")
        assert code == 1 and "no normal training image" in err

    def test_predict(self, call, mvtec_like, tmp_path):
        assert call(train_command, "--config", "configs/folder.yaml")[0] == 0
        run, images = tmp_path / "runs/folder/one-class/part/r", tmp_path / "new"
        for name in NAMES:
            write_image(images / "sub" / name, np.random.default_rng(len(name)))
        write_image(images / "sub" / os.fsdecode(b"\xff.png"), np.random.default_rng(0))
        write_image(images / "sub/same.png", np.random.default_rng(5))
        flags = (images, "--checkpoint", run, "--device", "cpu", "--output", images / "out")
        (images / "x.png").write_bytes(b"text")
        code, _, err = call(predict_command, *flags)
        assert (
            code == 1
            and err.count("\n") == 1
            and "--skip-unreadable" in err
            and [p.name for p in (images / "out").iterdir()] == ["unfinished"]
        )
        code, out, err = call(predict_command, *flags, "--skip-unreadable", "--overwrite")
        assert code == 0 and "x.png: by its content" in err
        assert r"new\nline.png" in out and "größe-部.png" in out
        rows = list(csv.DictReader((images / "out/scores.csv").open(newline="")))
        assert {r["path"] for r in rows} == {f"sub/{n}" for n in [*NAMES, "same.png", "\\udcff.png"]}
        skipped = list(csv.DictReader((images / "out/skipped.csv").open()))
        assert [r["path"] for r in skipped] == ["x.png"]
        pictures = {p.name for p in (images / "out/heatmaps/sub").iterdir()}
        assert {"same.png.png", "same.bmp.png", "new\nline.png.png"} <= pictures and len(pictures) == 9
        (images / "x.png").unlink()
        code, out, err = call(predict_command, *flags, "--overwrite")  # earlier pictures are no new images
        assert code == 0 and "9 images, most anomalous first" in out
        assert not (images / "out/skipped.csv").exists()

    def test_predict_on_damaged_files(self, call, mvtec_like, tmp_path):
        """Each file ends up either in scores.csv or in skipped.csv, and nothing else is said."""
        assert call(train_command, "--config", "configs/folder.yaml")[0] == 0
        rng = np.random.default_rng(3)
        for i in range(120):
            kind = list(SEEDS)[i % len(SEEDS)]
            damaged = bytearray(SEEDS[kind])
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
            path = tmp_path / f"new/{i}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged[: len(damaged) - (i % 3 == 0) * int(rng.integers(len(damaged)))])
        run, out = tmp_path / "runs/folder/one-class/part/r", tmp_path / "out"
        flags = ("--checkpoint", run, "--device", "cpu", "--output", out, "--skip-unreadable", "--quiet")
        code, _, err = call(predict_command, tmp_path / "new", *flags)
        assert code == 0 and "Traceback" not in err and "Warning" not in err
        scored = [r["path"] for r in csv.DictReader((out / "scores.csv").open())]
        skipped = [r["path"].rpartition("/")[2] for r in csv.DictReader((out / "skipped.csv").open())]
        assert sorted(scored + skipped) == sorted(f"{i}.png" for i in range(120))
        assert len(scored) > 20 and len(skipped) > 40

    def test_predict_overwrites_no_image(self, call, mvtec_like, tmp_path):
        assert call(train_command, "--config", "configs/folder.yaml")[0] == 0
        flags = ("--checkpoint", tmp_path / "runs/folder/one-class/part/r", "--device", "cpu", "--output")
        images = tmp_path / "heatmaps"
        write_image(images / "a.png", np.random.default_rng(0))
        before = (images / "a.png").read_bytes()
        code, _, err = call(predict_command, images, *flags, tmp_path)
        assert code == 1 and "a.png is where an output goes, and one of the images" in err
        code, _, err = call(predict_command, images, *flags, images)
        assert code == 1 and "is the folder of the images" in err
        assert (images / "a.png").read_bytes() == before


def test_report_of_odd_names(call, mvtec_like, tmp_path):
    """Names are text in the page, whatever they hold."""
    write_image(mvtec_like / "part/test/good/<script>alert(1)\n\"'.png", np.random.default_rng(0))
    (mvtec_like / "part/test/spot").rename(mvtec_like / "part/test/<i>")
    (mvtec_like / "part/ground_truth/spot").rename(mvtec_like / "part/ground_truth/<i>")
    assert call(train_command, "--config", "configs/folder.yaml")[0] == 0
    page = (tmp_path / "runs/folder/one-class/part/r/report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page and "<i>" not in page


def test_a_check_decodes_in_full(tmp_path):
    """A header that is fine is not enough."""
    whole = encoded(PHOTO, "PNG")
    (tmp_path / "a.png").write_bytes(whole)
    (tmp_path / "b.png").write_bytes(whole[:-40])
    samples = [Sample(tmp_path / n, UNKNOWN, None, "", "predict", "", n) for n in ("a.png", "b.png")]
    kept, skipped = filter_unreadable(samples)
    assert kept == samples[:1] and list(skipped) == [tmp_path / "b.png"]
