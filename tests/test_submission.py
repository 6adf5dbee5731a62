"""The archive for MVTec AD 2's server: its tree and form as the server has them, and what its numbers are."""

import shutil
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import TINY
from fixtures import COUNTS, write_layout
from PIL import Image

import train
from datasets.registry import SPECS
from model import load_detector
from scripts import submit_mvtec_ad2 as submit
from utils.cli import run_command

CATEGORIES = tuple(COUNTS["mvtec_ad2"])
SMALL = dict.fromkeys(CATEGORIES, 4)  # private images


def trained(root, output, *flags):
    """Run folders by category of a memory bank on the layout at `root`."""
    words = [
        "--dataset", "mvtec_ad2", "--data-root", str(root), "--quiet", "--output", str(output),
        "--model", "memory-bank", "--backbone", TINY, "--weights", "random", "--device", "cpu",
        "--precision", "fp32", "--eval", "none", "--set", "data.image_size=64", *flags,
    ]  # fmt: skip
    assert run_command(train.main, words) == 0
    return {path.parts[-3]: path.parent for path in Path(output).rglob("last.pt")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Root and runs by category; not to be changed."""
    folder = tmp_path_factory.mktemp("ad2")
    root = write_layout("mvtec_ad2", folder / "mvtec_ad2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "mvtec_ad2", replace(SPECS["mvtec_ad2"], counts=COUNTS["mvtec_ad2"]))
        return root, trained(root, folder / "runs")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(submit, "PRIVATE", SMALL)


@pytest.fixture
def call(place, tmp_path, capfd):
    def call(root=None, runs=None, *flags):
        runs = place[1].values() if runs is None else runs
        words = [*map(str, runs), "--data-root", str(root or place[0]), "--device", "cpu", "--quiet"]
        code = run_command(submit.main, [*words, "--output", str(tmp_path / "mine.tar.gz"), *flags])
        return code, *capfd.readouterr()

    return call


def members(path):
    """Name to content of each file in the archive, the name below the folder that it must have."""
    with tarfile.open(path, "r:gz") as archive:
        found = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
    assert {name.split("/")[0] for name in found} == {path.name.removesuffix(".tar.gz")}
    return {name.partition("/")[2]: content for name, content in found.items()}


def test_the_server_takes_all_categories(monkeypatch):
    monkeypatch.undo()
    assert set(submit.PRIVATE) == set(SPECS["mvtec_ad2"].counts)
    assert sum(submit.PRIVATE.values()) == 2045


def test_tree_and_form(call, tmp_path):
    code, out, err = call()
    assert code == 0, err
    files = members(tmp_path / "mine.tar.gz")
    names = {
        f"{top}/{category}/{folder}/{i:03d}_{ending}{suffix}"
        for top, suffix in (("anomaly_images", ".tiff"), ("anomaly_images_thresholded", ".png"))
        for category in CATEGORIES
        for folder, ending in (("test_private", "regular"), ("test_private_mixed", "mixed"))
        for i in range(4)
    }
    assert set(files) == names
    for name in (n for n in names if n.endswith(".tiff")):
        a_map = tifffile.imread(BytesIO(files[name]))
        mask = Image.open(BytesIO(files[name.replace("images/", "images_thresholded/", 1)[:-4] + "png"]))
        assert a_map.shape == (40, 40) and a_map.dtype == np.float16 and np.isfinite(a_map).all()
        assert mask.mode == "L" and np.array_equal(mask, np.where(a_map > 3, 255, 0))
    assert out.count("| 8 |") == 2 and all(f"| {category} | 3 |" in out for category in CATEGORIES)


def test_the_unit_is_of_the_held_out_normals(call, place, tmp_path):
    """And of nothing else: without the labelled test images, and with other private ones, it stays."""
    root = Path(shutil.copytree(place[0], tmp_path / "mvtec_ad2"))
    assert call()[0] == 0
    files = members(tmp_path / "mine.tar.gz")
    for path in root.glob("*/test_public/**/*.png"):
        path.unlink()
    other = root / "can/test_private/001_regular.png"
    Image.fromarray(255 - np.asarray(Image.open(other))).save(other)
    assert call(root, None, "--overwrite")[0] == 0
    again = members(tmp_path / "mine.tar.gz")
    changed = {name for name in files if files[name] != again[name]}
    assert {Path(name).stem for name in changed} == {"001_regular"} and len(changed) <= 2

    detector = load_detector(place[1]["can"], device="cpu")
    held_out = [
        found.anomaly_map for found in detector.predict(sorted((root / "can/validation/good").glob("0*")))
    ]
    (seen,) = detector.predict([root / "can/test_private/002_regular.png"])
    expected = (seen.anomaly_map - np.mean(held_out)) / np.std(held_out)
    written = tifffile.imread(BytesIO(again["anomaly_images/can/test_private/002_regular.tiff"]))
    assert np.allclose(written, expected, rtol=2e-3, atol=2e-3)


def test_one_model_of_all_categories(call, place, tmp_path, monkeypatch):
    monkeypatch.setitem(SPECS, "mvtec_ad2", replace(SPECS["mvtec_ad2"], counts=COUNTS["mvtec_ad2"]))
    runs = trained(place[0], tmp_path / "runs", "--setting", "multi-class")
    assert call(None, runs.values())[0] == 0 and len(members(tmp_path / "mine.tar.gz")) == 32


def test_scale_over_maps_of_any_size():
    rng = np.random.default_rng(0)
    maps = [rng.normal(5, 2, shape).astype(np.float32) for shape in ((3, 4), (10, 2), (1, 1))]
    pixels = np.concatenate([a_map.ravel() for a_map in maps]).astype(np.float64)
    assert np.allclose(submit.scale_of(maps), (pixels.mean(), pixels.std()), rtol=1e-12)
    with pytest.raises(ValueError, match=r"standard deviation 0\.0: no scale"):
        submit.scale_of([np.ones((3, 3), np.float32)])


def test_half_precision_keeps_the_order_and_stays_finite():
    scale = submit.Scale(1000.0, 1e-3)
    steps = scale(np.float32(1000) + np.arange(8, dtype=np.float32) * 1e-3)
    assert steps.dtype == np.float16 and (np.diff(steps) > 0).all()
    assert scale(np.float32([0, 1e9])).tolist() == [-65504, 65504]


def encoded(a_map, mask):
    tiff, png = BytesIO(), BytesIO()
    tifffile.imwrite(tiff, a_map)
    Image.fromarray(mask).save(png, format="PNG")
    return tiff.getvalue(), png.getvalue()


@pytest.mark.parametrize(
    ("a_map", "mask", "message"),
    [
        (np.zeros((4, 5), np.float32), np.zeros((4, 5), np.uint8), "map of x.png is float32"),
        (np.zeros((5, 4), np.float16), np.zeros((4, 5), np.uint8), r"float16 \(5, 4\)"),
        (np.full((4, 5), np.nan, np.float16), np.zeros((4, 5), np.uint8), "20 values not finite"),
        (
            np.zeros((4, 5), np.float16),
            np.ones((4, 5), np.uint8),
            r"thresholded map of x.png .* values \[1\]",
        ),
        (np.zeros((4, 5), np.float16), np.zeros((4, 5, 3), np.uint8), r"thresholded .* \(4, 5, 3\)"),
    ],
)
def test_a_wrong_form_is_found(a_map, mask, message):
    with pytest.raises(ValueError, match=message):
        submit.check_form(Path("x.png"), *encoded(a_map, mask), (4, 5))


def test_a_missing_file_is_found():
    with pytest.raises(ValueError, match="32 files are missing or too many .* anomaly_images/can/"):
        submit.check_names([])


@pytest.mark.parametrize("damage", ["image", "extra", "held out", "category"])
def test_other_images_than_released(call, place, tmp_path, damage):
    root = Path(shutil.copytree(place[0], tmp_path / "mvtec_ad2"))
    folder = root / "vial/test_private_mixed"
    if damage == "image":
        (folder / "002_mixed.png").unlink()
        message = "vial/test_private_mixed lacks 002_mixed.png; expected 000_mixed.png to 003_mixed.png"
    elif damage == "extra":
        shutil.copy(folder / "002_mixed.png", folder / "004_mixed.png")
        message = "has also 004_mixed.png"
    elif damage == "category":
        shutil.rmtree(root / "vial")
        message = "mvtec_ad2 lacks vial; the server takes all 2 categories"
    else:
        shutil.rmtree(root / "vial/validation")
        message = "vial/validation/good, which the threshold is made from"
    code, _, err = call(root)
    assert code == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "mine.tar.gz").exists()


def test_runs_that_do_not_fit(call, place, tmp_path):
    runs = place[1]
    for given, message in (
        ([runs["can"]], "no run of vial; the server takes all 2 categories"),
        ([*runs.values(), runs["can"]], "are both of can; leave one out"),
    ):
        code, _, err = call(None, given)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*mine*"))


def test_an_archive_is_not_replaced_and_has_its_ending(call, tmp_path):
    (tmp_path / "mine.tar.gz").write_text("mine")
    code, _, err = call()
    assert code == 1 and "is there already" in err and (tmp_path / "mine.tar.gz").read_text() == "mine"
    code, _, err = call(None, None, "--output", str(tmp_path / "mine.zip"))
    assert code == 2 and "ends in .tar.gz" in err


def test_a_failure_leaves_nothing_behind(call, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(submit, "files_of", fail)
    code, _, err = call()
    assert code == 1 and "no space left" in err and not list(tmp_path.glob("*mine*"))
