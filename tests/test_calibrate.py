"""calibrate.py: other held-out scores for a trained model, in a new file beside the old one."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_mvtec_like
from PIL import Image
from test_predict import RUN, fitted, run  # noqa: F401 (fixtures)

import calibrate as calibrate_command
from calibrate import normals_needed
from utils.checkpoint import load_checkpoint
from utils.cli import run_command


@pytest.fixture
def recalibrate(run, tmp_path, capfd):  # noqa: F811
    """Run calibrate.py on a fitted memory bank: (exit code, stdout, stderr)."""

    def call(*flags):
        argv = ["--checkpoint", str(tmp_path / RUN), "--device", "cpu", "--quiet", *map(str, flags)]
        return run_command(calibrate_command.main, argv), *capfd.readouterr()

    return call


def test_new_scores_beside_the_old_ones(recalibrate, run, mvtec_like, tmp_path):  # noqa: F811
    old, new = tmp_path / RUN / "last.pt", tmp_path / RUN / "recalibrated.pt"
    before = old.read_bytes()
    code, out, err = recalibrate(mvtec_like / "part/test/good")
    assert code == 0, err
    assert "4 held-out images; a false-alarm rate of 0.01 needs 99: 95 more" in out and str(new) in out
    assert "by the 5 old ones their median p-value is" in out
    assert old.read_bytes() == before
    ours, theirs = load_checkpoint(old), load_checkpoint(new)
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in ours.model) and theirs.finished
    code, _, _ = run(str(mvtec_like / "part/test/good"), "--checkpoint", str(new), "--quiet")
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert code == 0 and sorted(float(row["p_value"]) for row in rows) == [0.4, 0.6, 0.8, 1.0]


def test_the_rate_is_met(recalibrate, mvtec_like):
    _, out, _ = recalibrate(mvtec_like / "part/test/good", "--false-alarm-rate", "0.2")
    assert "4 held-out images; a false-alarm rate of 0.2 needs 4: enough" in out


@pytest.mark.parametrize("rate", [0.9, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.01, 0.001, 1 / 49, 1 / 3])
def test_how_many_images_a_rate_needs(rate):
    assert normals_needed(rate) == next(n for n in range(10_000) if 1 / (n + 1) <= rate)


def test_copies_count_once(recalibrate, mvtec_like, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(mvtec_like / "part/test/good", tmp_path / "new" / name)
    assert "4 held-out images" in recalibrate(tmp_path / "new")[1]


def test_what_is_not_used_is_said(recalibrate, mvtec_like, tmp_path):
    shutil.copytree(mvtec_like / "part/test/good", tmp_path / "new")
    (tmp_path / "new/more.webp").write_bytes(b"x")
    code, _, err = recalibrate(tmp_path / "new")
    assert code == 0 and "not used in" in err and "1 files of other kinds: 1 ending in .webp" in err


def test_images_that_were_trained_on_are_refused(recalibrate, run, tmp_path):  # noqa: F811
    root = Path(load_checkpoint(tmp_path / RUN / "last.pt").config.run.data_root)
    code, _, err = recalibrate(root / "part/train/good")
    assert code == 1 and "which the model was trained on" in err
    shutil.move(root, root.with_name("moved"))
    code, _, err = recalibrate(root.with_name("moved") / "part/train/good")
    write_mvtec_like(root)  # other tests use it
    assert code == 0 and "are not at" in err and "overlap with them is not checked" in err


@pytest.mark.parametrize("change", ["other images", "fewer", "none"])
def test_images_that_are_no_longer_there_are_told(recalibrate, mvtec_like, tmp_path, change):
    """What was trained on is known by its names and sizes: whether it is among new images no longer is."""
    path = tmp_path / RUN / "last.pt"
    state = load_checkpoint(path)
    root = shutil.copytree(state.config.run.data_root, tmp_path / "copy")
    here = replace(state.config.run, data_root=str(root))
    replace(state, config=replace(state.config, run=here)).save(path)
    for image in sorted((root / "part/train/good").iterdir()) if change != "none" else ():
        if change == "fewer":
            image.unlink()
            break
        Image.new("RGB", (40, 48), tuple(image.read_bytes()[-3:])).save(image)
    new = shutil.copytree(mvtec_like / "part/test/good", tmp_path / "new")
    code, _, err = recalibrate(new)
    told = f"the training images are no longer those at {root}: overlap with them is not checked"
    assert code == 0 and (told in err) == (change != "none")


def test_what_is_there_is_kept(recalibrate, mvtec_like, tmp_path):
    good, new = mvtec_like / "part/test/good", tmp_path / RUN / "recalibrated.pt"
    assert recalibrate(good)[0] == 0
    before = new.read_bytes()
    code, _, err = recalibrate(good / "000.png")
    assert code == 1 and "is there already" in err and new.read_bytes() == before
    assert recalibrate(good / "000.png", "--overwrite")[0] == 0
    assert len(load_checkpoint(new).calibration["scores"]) == 1


def test_another_precision_becomes_that_of_the_held_out_scores(recalibrate, run, mvtec_like, tmp_path):  # noqa: F811
    good, new = mvtec_like / "part/test/good", tmp_path / RUN / "recalibrated.pt"
    assert recalibrate(good, "--precision", "bf16")[0] == 0
    code, _, err = run(str(good), "--checkpoint", str(new), "--quiet")
    assert code == 0 and "approximate" not in err
    assert load_checkpoint(new).config.run.eval_precision == "bf16"


def test_mistakes(recalibrate, mvtec_like, tmp_path):
    code, _, err = recalibrate(tmp_path / "no_such")
    assert code == 1 and "no image at" in err
    code, _, err = recalibrate(mvtec_like / "part/test/good", "--false-alarm-rate", "1")
    assert code == 2 and "between 0 and 1" in err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_text("no image")
    code, _, err = recalibrate(tmp_path / "bad", "--skip-unreadable")
    assert code == 1 and "can be read" in err
