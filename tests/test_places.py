"""Where data lies and results go: one resolved root, relative paths, names of any bytes, nothing mixed."""

import csv
import io
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_image
from PIL import Image

import predict as predict_command
import test as test_command
import train as train_command
from evaluation.figures import write_on
from evaluation.results import LONGEST_NAME, begin, claim, finish, names_of
from utils.cli import run_command
from utils.errors import DatasetError, RunError

RNG = np.random.default_rng(3)
ODD = os.fsdecode(b"kratzer gro\xdf")  # Latin-1, as archives from Windows hold it
REAL = os.fsdecode(b"te\xdfil")  # also the category
SHOWN = r"kratzer gro\udcdf"
NAMES = ["test/good/000.png", "test/good/001.png", f"test/{SHOWN}/000.png", f"test/{SHOWN}/001.png"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with REAL, the link `mypart` to it, and a calibrated run of the relative root `mypart`.

    Training prints to a terminal that knows ASCII alone; `printed` has what came out.
    """
    top = tmp_path_factory.mktemp("place")
    for i in range(10):
        write_image(top / f"{REAL}/train/good/{i}.png", RNG)
    for i in range(2):
        write_image(top / f"{REAL}/test/good/{i:03d}.png", RNG)
        write_image(top / f"{REAL}/test/{ODD}/{i:03d}.png", RNG, spot=True)
    (top / "mypart").symlink_to(REAL)
    argv = ["--config", "configs/folder.yaml", "--data-root", "mypart", "--output", "runs", "--quiet"]
    argv += ["--model", "memory-bank", "--device", "cpu", "--precision", "fp32", "--name", "r"]
    for setting in ("data.image_size=64", "data.calibration_fraction=0.4", "model.weights=random"):
        argv += ["--set", setting]
    argv[1] = str(Path(argv[1]).resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top)
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert run_command(train_command.main, argv) == 0
        (top / "printed").write_bytes(sys.stdout.buffer.getvalue())
    return top


@pytest.fixture
def run(place):
    (folder,) = place.glob("runs/folder/one-class/*/r")
    return folder


@pytest.fixture
def call(run, tmp_path, capfd, monkeypatch):
    """Run a command in an empty folder: (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(command, *flags):
        argv = ["--checkpoint", str(run), "--device", "cpu", "--quiet", *map(str, flags)]
        return run_command(command.main, argv), capfd.readouterr().err

    return call


def rows(folder):
    return list(csv.DictReader((folder / "scores.csv").open(newline="")))


def test_odd_names_and_an_ascii_terminal(place, run):
    printed = (place / "printed").read_text()
    assert "| I-AUROC |" in printed and str(run.relative_to(place)) in printed
    assert [row["path"] for row in rows(run)] == NAMES
    assert {row["defect"] for row in rows(run)} == {"good", SHOWN}
    assert SHOWN in (run / "report.html").read_text() and (run / "heatmaps.png").is_file()


def test_a_test_from_anywhere_keeps_what_the_run_has(call, run, place, tmp_path):
    assert call(test_command, "--save-maps", "--output", "out") == (0, "")  # overlap was checked: no warning
    found, trained = rows(tmp_path / "out"), rows(run)
    assert [r["path"] for r in found] == NAMES
    assert [(r["p_value"], r["is_anomalous"]) for r in found] == [
        (r["p_value"], r["is_anomalous"]) for r in trained
    ]
    maps = {p.relative_to(tmp_path / "out/maps").as_posix() for p in (tmp_path / "out").rglob("*.tiff")}
    assert maps == {f"test/{d}/{i:03d}.tiff" for d in ("good", ODD) for i in range(2)}
    before = (tmp_path / "out/scores.csv").read_bytes()
    code, err = call(test_command, "--output", "out", "--set", "score.map_sigma=2")
    assert code == 1 and "of an earlier call: choose another --output" in err and "maps" in err
    assert (tmp_path / "out/scores.csv").read_bytes() == before
    code, err = call(test_command, "--output", "out", "--set", "score.map_sigma=2", "--overwrite")
    assert code == 0 and "no p-values: the held-out scores are of" in err
    assert "p_value" not in rows(tmp_path / "out")[0] and not (tmp_path / "out/maps").exists()
    code, err = call(test_command, "--output", run, "--overwrite")
    assert code == 1 and "is the folder of a run" in err


@pytest.mark.parametrize("root", [".", "~/newtest", "../newtest", "link"])
def test_a_renamed_copy_is_compared_with_what_was_trained_on(call, place, tmp_path, root, monkeypatch):
    home = tmp_path / "home"
    new = shutil.copytree(place / REAL, home / "newtest")
    shutil.rmtree(new / "train")  # only what is tested, and what makes it a root
    write_image(new / "train/good/another.png", RNG)
    (new / "link").symlink_to(new)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(new)
    out = tmp_path / "out"
    assert call(test_command, "--data-root", root, "--output", out) == (0, "")
    assert [r["path"] for r in rows(out)] == NAMES
    shutil.copy(place / REAL / "train/good/3.png", new / "test/good/copy.png")
    code, err = call(test_command, "--data-root", root, "--output", out, "--overwrite")
    assert code == 1 and "copy.png of the test set is the same file as" in err


def test_predictions_are_never_mixed(call, run, place, tmp_path, monkeypatch):
    images, out = shutil.copytree(place / REAL / "test", tmp_path / "new"), tmp_path / "out"
    monkeypatch.chdir(images)
    long = "x" * 247 + ".png"
    shutil.copy(images / "good/000.png", images / "good" / long)
    shutil.copy(images / "good/000.png", images / "good" / ("ü" * 125 + "y.png"))  # 255 bytes
    flags = (".", "--output", out)
    assert call(predict_command, *flags, "--save", "map,overlay")[0] == 0
    assert {r["path"] for r in rows(out)} == {p.removeprefix("test/") for p in NAMES} | {
        f"good/{long}", f"good/{'ü' * 125}y.png",
    }  # fmt: skip
    assert len(list(out.rglob("*.tiff"))) == 6 and (out / "maps/good" / ("x" * 247 + ".tiff")).is_file()
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    code, err = call(predict_command, images / "good/000.png", "--output", out)
    assert code == 1 and "holds scores.csv, heatmaps, maps of an earlier call" in err
    assert {p: p.read_bytes() for p in out.rglob("*.*")} == before
    assert call(predict_command, "good/000.png", "--output", out, "--save", "overlay", "--overwrite")[0] == 0
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.*")} == {"scores.csv", "heatmaps/000.png"}
    code, err = call(predict_command, images / "good/000.png", "--output", run)
    assert code == 1 and "is the folder of a run" in err
    before = sorted((place / REAL).rglob("*"))
    code, err = call(predict_command, images, "--output", place / REAL, "--save", "mask")
    assert code == 1 and "or of a dataset; choose another" in err  # they would be read as true masks
    assert sorted((place / REAL).rglob("*")) == before


def test_a_stopped_prediction(call, run, place, tmp_path, monkeypatch):
    images, out = place / REAL / "test/good", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(predict_command, "write_scores", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        code, err = call(predict_command, images, "--output", out)
    assert code == 1 and err == "stopped\n"  # nothing to resume
    code, err = call(predict_command, images, "--output", out)
    assert code == 1 and "holds heatmaps, unfinished of a stopped call" in err
    assert call(predict_command, images, "--output", out, "--overwrite")[0] == 0
    assert {p.name for p in out.iterdir()} == {"scores.csv", "heatmaps"}


def test_libraries_speak_from_warnings_on(capfd):
    """timm tells of each state dict that it reads."""

    def main(argv):
        for name, text in (("timm.models._builder", "Loading"), ("uninet", "ours")):
            logging.getLogger(name).info(text)

    assert run_command(main, []) == 0 and capfd.readouterr().err == "ours\n"


class TestClaim:
    def test_what_is_not_an_earlier_call(self, tmp_path):
        assert claim(tmp_path / "none", overwrite=False) == claim(tmp_path, overwrite=True) == []
        write_image(tmp_path / "masks/a.png", RNG)  # somebody's own masks
        with pytest.raises(RunError, match=r"holds masks, but no scores\.csv"):
            claim(tmp_path, overwrite=True)
        (tmp_path / "scores.csv").write_text("path")
        with pytest.raises(RunError, match="a.png is where an output goes, and one of the images"):
            claim(tmp_path, overwrite=True, images=[tmp_path / "masks/a.png"])
        begin(tmp_path, claim(tmp_path, overwrite=True))
        assert [p.name for p in tmp_path.iterdir()] == ["unfinished"]

    def test_links_are_removed_alone(self, tmp_path):
        write_image(tmp_path / "elsewhere/a.png", RNG)
        (tmp_path / "maps").symlink_to("elsewhere")
        (tmp_path / "scores.csv").write_text("path")
        begin(tmp_path, claim(tmp_path, overwrite=True))
        assert [p.name for p in tmp_path.rglob("*.*")] == ["a.png"]

    def test_what_a_stopped_call_left_is_replaced(self, tmp_path):
        begin(tmp_path, [])
        write_image(tmp_path / "masks/a.png", RNG)
        with pytest.raises(RunError, match=r"holds masks, unfinished of a stopped call: .* --overwrite"):
            claim(tmp_path, overwrite=False)
        begin(tmp_path, claim(tmp_path, overwrite=True))
        finish(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestNames:
    def test_long_names_are_cut_and_stay_apart(self):
        images = [Path("d") / (f"{'ü' * 120}{end}.png") for end in ("a" * 11, "b" * 11)]
        names = names_of(images, ".tiff")
        assert len(set(names)) == 2 and names == names_of(images, ".tiff")
        assert all(len(os.fsencode(n.name)) <= LONGEST_NAME and n.suffix == ".tiff" for n in names)

    def test_a_folder_named_as_a_picture(self):
        assert names_of([Path("a.jpg"), Path("a.png/b.jpg")], ".png") == [
            Path("a.jpg.png"),
            Path("a.png/b.jpg.png"),
        ]
        with pytest.raises(DatasetError, match="the folder a.jpg.png has the name of a picture"):
            names_of([Path("a.jpg"), Path("a.bmp"), Path("a.jpg.png/b.jpg")], ".png")


@pytest.mark.parametrize(("text", "drawn"), [("größe", "große"), (ODD, "kratzer gro?"), ("部\0\n", "???")])
def test_any_text_is_drawn(text, drawn):
    pictures = [np.full((20, 200, 3), 255, np.uint8) for _ in range(2)]
    write_on(pictures[0], text, (3, 14), 0.4)
    write_on(pictures[1], drawn.replace("ß", "?"), (3, 14), 0.4)
    assert np.array_equal(*pictures) and pictures[0].min() < 100


def test_a_tree_of_maps_is_32_bit(call, place, tmp_path):
    assert call(test_command, "--save-maps", "--output", "out", "--data-root", place / "mypart")[0] == 0
    assert np.asarray(Image.open(tmp_path / "out/maps/test/good/000.tiff")).dtype == np.float32
