"""The demo: what is written, that defects are seen, exact masks, and the script from images to decisions."""

import json
import re

import numpy as np
import printed_commands
import pytest
from conftest import ROOT, TINY
from PIL import Image

from datasets import demo
from datasets.demo import DEMO_CATEGORIES, NEW, TEST, TEST_DEFECTS, TRAIN, demo_pictures, main, write_demo
from datasets.demo_scenes import MIN_CHANGE, SCENES, render
from datasets.synthetic import DEFECT_KINDS
from scripts import demo as script
from utils.cli import run_command
from utils.yaml_io import read_yaml


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "a", size=64)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A demo of few images, for tests of how it is written."""
    monkeypatch.setattr(demo, "TRAIN", 6)
    monkeypatch.setattr(demo, "TEST", 2)
    monkeypatch.setattr(demo, "TEST_DEFECTS", 4)
    return write_demo(tmp_path / "few", size=64)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_layout_counts_and_values(root):
    assert sorted(p.name for p in root.iterdir()) == sorted([*DEMO_CATEGORIES, "demo.json", "new"])
    for category in DEMO_CATEGORIES:
        kinds, folder = SCENES[category].kinds, root / category
        count = {"train/good": TRAIN, "test/good": TEST} | {f"test/{kind}": TEST_DEFECTS for kind in kinds}
        for name, number in count.items():
            assert sorted(p.stem for p in (folder / name).iterdir()) == [f"{i:03d}" for i in range(number)]
        for kind in kinds:
            masks = sorted(p.stem for p in (folder / "ground_truth" / kind).iterdir())
            assert masks == [f"{i:03d}_mask" for i in range(TEST_DEFECTS)]
        new = [p.stem.partition("_")[0] for p in (root / "new" / category).iterdir()]
        assert sorted(new) == sorted([*["good"] * NEW, *kinds])
        for path in folder.rglob("*.png"):
            pixels = np.asarray(Image.open(path))
            if "ground_truth" in path.parts:
                assert pixels.shape == (64, 64) and set(np.unique(pixels)) == {0, 255}
            else:
                assert pixels.shape == (64, 64, 3) and pixels.std() > 2


@pytest.mark.slow
def test_no_image_is_there_twice(root):
    images = [p.read_bytes() for p in root.rglob("*.png") if "ground_truth" not in p.parts]
    assert len(set(images)) == len(images) == sum(len(demo_pictures(name)) for name in DEMO_CATEGORIES)


@pytest.mark.parametrize("category", DEMO_CATEGORIES)
def test_a_defect_is_seen_and_its_mask_is_exact(category):
    for kind in SCENES[category].kinds:
        for seed in range(3):
            good, empty = render(category, (seed,), 128)
            image, mask = render(category, (seed,), 128, kind)
            change = np.abs(image.astype(int) - good).max(axis=2)
            assert not empty.any() and (change > 0).sum() <= mask.sum() and not change[mask == 0].any()
            assert 0.002 < mask.mean() < 0.06
            assert np.percentile(change[mask == 1], 90) > 4 * MIN_CHANGE, (kind, seed)


def test_training_draws_none_of_the_test_defects():
    assert not {kind for scene in SCENES.values() for kind in scene.kinds} & {*DEFECT_KINDS, "speed", "zoom"}


def test_it_is_identical_elsewhere_and_kept_where_it_is(few, tmp_path):
    before = contents(few)
    times = {p: p.stat().st_mtime_ns for p in few.rglob("*")}
    assert write_demo(few, size=64) == few
    assert times == {p: p.stat().st_mtime_ns for p in few.rglob("*")}
    assert contents(write_demo(tmp_path / "b", size=64)) == before


@pytest.mark.parametrize("stop_at", [0, 30])
def test_an_interrupted_demo_is_completed(few, tmp_path, monkeypatch, stop_at):
    saved, save = [], demo._save

    def failing(path, image):
        if len(saved) >= stop_at:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_save", failing)
        write_demo(tmp_path / "c", size=64)
    assert not (tmp_path / "c" / "demo.json").exists()
    assert contents(write_demo(tmp_path / "c", size=64)) == contents(few)


@pytest.mark.slow
def test_a_lost_file_or_another_recipe_is_written_anew(few, tmp_path, monkeypatch):
    copy = write_demo(tmp_path / "d", size=64)
    (copy / "flange/test/dent/003.png").unlink()
    assert contents(write_demo(copy, size=64)) == contents(few)
    monkeypatch.setattr(demo, "RECIPE_VERSION", demo.RECIPE_VERSION + 1)
    write_demo(copy, size=40)
    assert json.loads((copy / "demo.json").read_text())["recipe"] == demo.RECIPE_VERSION
    assert Image.open(copy / "flange/test/dent/003.png").size == (40, 40)


def test_the_categories_of_the_first_demo_go(few, tmp_path):
    first = tmp_path / "first"
    (first / "brick/train/good").mkdir(parents=True)
    (first / "brick/train/good/000.png").write_bytes(b"old")
    (first / "demo.json").write_text('{"recipe": 1, "size": 256, "photographs": {}}')
    assert contents(write_demo(first, size=64)) == contents(few)


def test_other_peoples_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "flange").mkdir()
    (tmp_path / "flange/mine.txt").write_text("precious")
    assert run_command(main, ["--output", str(tmp_path)]) == 1
    assert "new or an empty folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"flange/mine.txt": b"precious"}


# --- scripts/demo.sh ----------------------------------------------------------------------------------------


def test_held_out_parts_support_the_rate():
    config = read_yaml(ROOT / "configs/demo.yaml")
    held_out = round(config["data"]["calibration_fraction"] * TRAIN)
    assert 1 / (held_out + 1) <= script.RATE


@pytest.mark.slow
def test_from_images_to_decisions(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["--data-root", str(root), "--output", str(tmp_path), "--category", "flange", "--device", "cpu"]
    flags += ["--backbone", TINY, "--weights", "random", "--precision", "fp32", "--iterations", "2"]
    monkeypatch.setattr(script, "write_demo", lambda root: write_demo(root, size=64))
    monkeypatch.setattr("datasets.build.write_demo", lambda root: write_demo(root, size=64))
    flags += ["--set", "data.image_size=64", "--quiet"]
    assert run_command(script.main, flags) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "not used" not in said.err  # the new images are of no split on purpose
    assert [line[:5] for line in lines if line.startswith("[")] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    decided = [line for line in lines if re.search(r"p = 0\.\d{3}.*_\d{3}\.png$|p = 1\.000.*png$", line)]
    assert len(decided) == NEW + len(SCENES["flange"].kinds)
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["category", "flange, memory-bank", "flange, remind"]
    paths = [line.split()[-1] for line in lines if line.startswith(("report", "heatmaps"))]
    assert len(paths) == 2 and all((ROOT / path).exists() for path in paths)
    for line in lines[-2:]:  # what comes next
        words = re.search("(python|bash) .*", line)[0].split()
        printed_commands.check(printed_commands.Printed(tuple(words), "demo"))
    # once more: finished runs are kept, another model joins
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.json")}
    assert run_command(script.main, [*flags, "--model", "uninet", "--flavor", "paper"]) == 0
    rows = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ]
    assert rows == ["category", "flange, memory-bank", "flange, uninet"]
    assert before.items() < {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.json")}.items()


def test_a_wrong_flag_is_said_before_anything_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_command(script.main, ["--data-root", str(tmp_path / "x"), "--no-such-flag"])
    assert "--no-such-flag" in capsys.readouterr().err and not (tmp_path / "x").exists()
