"""scripts/figures/reproduce.py: what each figure asks for, and that it finds finished runs again."""

from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from conftest import TINY

from scripts.figures import reproduce as figures
from utils.cli import run_command
from utils.yaml_io import read_yaml

SPEC = read_yaml(figures.FIGURES)
SMALL = ["--backbone", TINY, "--iterations", "1", "--quiet", "--device", "cpu"]
for setting in ("data.image_size=64", "model.weights=random", "train.batch_size=2", "model.width=0.5"):
    SMALL += ["--set", setting]
SMALL += ["--set", "train.precision=fp32"]


@pytest.mark.parametrize("name", SPEC)
def test_every_figure_is_of_valid_runs(name):
    args = figures.parse_arguments([name, "--dry-run"])
    places = figures.places_of(SPEC[name], args)
    assert places
    for place in places:
        config = figures.tables._resolved(tuple(figures.tables.command_of(place.run, args)))
        assert config.data.name == place.run.dataset


def test_what_is_asked_for():
    args = figures.parse_arguments(["05", "--categories", "screw", "--rows", "ReContrast with DFS"])
    (place,) = figures.places_of(SPEC["05"], args)
    assert place.title == "mvtec screw" and place.run.flags[-1] == "model.dfs=prior"


@pytest.mark.slow
def test_curves_and_features_of_one_run(masters, tmp_path, capfd, copied_processes):
    flags = ["--data", str(masters["aptos"].parent), "--runs", str(tmp_path / "runs"), "--datasets", "aptos"]
    flags += ["--output", str(tmp_path / "out"), *SMALL, "--skip-unreadable"]
    assert run_command(figures.main, ["01c", *flags, "--rows", "UniNet, paper"]) == 0
    (before,) = (tmp_path / "runs").rglob("metrics.json")
    stamp = before.stat().st_mtime_ns
    assert run_command(figures.main, ["04", *flags, "--rows", "with L_SC and L_M"]) == 0
    assert [p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("metrics.json")] == [stamp]  # found again
    curves = ElementTree.parse(tmp_path / "out/figure01c.svg").getroot()
    words = "".join(curves.itertext())
    assert "aptos" in words and "UniNet, paper: " in words and "FPR" in words and "TPR" in words
    points = ElementTree.parse(tmp_path / "out/figure04.svg").getroot()
    assert len(list(points.iter("{http://www.w3.org/2000/svg}use"))) == 5 + 2  # images, and the legend
    assert capfd.readouterr().out.splitlines()[-1].endswith("figure04.svg")


def test_pictures(masters, tmp_path, capfd, copied_processes):
    flags = ["--data", str(masters["btad"].parent), "--runs", str(tmp_path / "runs"), "--images", "2", *SMALL]
    flags += ["--output", str(tmp_path / "out"), "--datasets", "btad", "--categories", "01"]
    assert run_command(figures.main, ["07", *flags]) == 0
    page = cv2.imread(str(tmp_path / "out/figure07.png"))
    assert page.shape == (22 + 3 * 128 + 30, 2 * (128 + 4), 3) and np.ptp(page) > 200


def test_features_are_embedded_apart():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 0.1, (20, 6)), rng.normal(5, 0.1, (20, 6))])
    flat = figures.embed(features)
    assert flat.min() >= 0 and flat.max() <= 1
    apart = np.linalg.norm(flat[:20].mean(0) - flat[20:].mean(0))
    assert apart > 2 * np.linalg.norm(flat[:20] - flat[:20].mean(0), axis=1).mean()
    np.testing.assert_allclose(flat, figures.embed(features))


def test_mistakes(capfd):
    assert run_command(figures.main, ["03"]) == 2 and "--data DIR" in capfd.readouterr().err
    assert run_command(figures.main, ["03", "--categories", "nosuch", "--dry-run"]) == 2
    assert "nothing by these" in capfd.readouterr().err
