"""AU-sPRO of MVTec LOCO AD: known answers, the definition by brute force, and the command."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY
from fixtures import COUNTS
from PIL import Image

import train
from datasets.registry import SPECS
from evaluation.metrics import pixel_metrics
from scripts import loco_spro
from scripts.loco_spro import Region, au_spro, read_saturation, region_of, saturated
from utils.cli import run_command
from utils.errors import DatasetError


def square(side=4, size=10):
    drawn = np.zeros((size, size), bool)
    drawn[:side, :5] = True
    return drawn


class TestKnownAnswers:
    def test_all_is_found_first(self):
        drawn = square()
        assert au_spro([(drawn.astype(np.float32), [saturated(drawn, 1, True)])]) == pytest.approx(1)

    def test_half_is_enough_where_it_saturates(self):
        """Half of the region stands out, all other pixels tie: the rest of the curve is a straight line."""
        drawn = square()
        a_map = np.zeros(drawn.shape, np.float32)
        a_map[:2, :5] = 1
        images = [(a_map, [saturated(drawn, 10, False)])]
        assert au_spro(images) == pytest.approx(1)
        images = [(a_map, [saturated(drawn, 1, True)])]
        assert au_spro(images) == pytest.approx(0.5 + 0.5 * 0.05 / 2)
        images = [(a_map, [saturated(drawn, 40, False)])]  # no more than the region's area
        assert au_spro(images) == pytest.approx(0.5 + 0.5 * 0.05 / 2)

    def test_each_region_counts_once(self):
        """One of two regions is found, of whatever size; the pixels of both are no false positives."""
        large, small = square(), np.zeros((10, 10), bool)
        small[9, 9] = True
        a_map = large.astype(np.float32) - small
        images = [(a_map, [saturated(large, 1, True), saturated(small, 1, True)])]
        assert au_spro(images) == pytest.approx(0.5)

    def test_false_positives_first(self):
        """A twentieth of the normal pixels lies above the region: nothing is found up to that rate."""
        drawn = square()
        a_map = drawn.astype(np.float32)
        a_map[9, :4] = 2
        images = [(a_map, [saturated(drawn, 1, True)])]
        assert au_spro(images, 0.05) == pytest.approx(0)
        assert au_spro(images, 0.1) == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("threshold", "share", "expected"), [(0.5, True, 2), (3, False, 3), (9, False, 5), (0.1, True, 1)]
    )
    def test_saturation_area(self, threshold, share, expected):
        assert saturated(np.ones((1, 5), bool), threshold, share).saturation == expected

    def test_undefined(self):
        empty, full = np.zeros((2, 2), np.float32), np.ones((2, 2), bool)
        assert au_spro([(empty, [])]) is None
        assert au_spro([(empty, [Region(full, 4)])]) is None


def by_definition(images, limit):
    """Each distinct score as the threshold, as the dataset's paper defines the curve; straight in between."""
    regions = [(a_map[r.drawn], r.saturation) for a_map, drawn in images for r in drawn]
    normal = [a_map[~np.any([r.drawn for r in drawn] or [a_map < -9], axis=0)] for a_map, drawn in images]
    normal = np.concatenate(normal)
    points = [(0.0, 0.0)]
    for t in np.unique(np.concatenate([a_map.ravel() for a_map, _ in images]))[::-1]:
        spro = np.mean([min(np.count_nonzero(scores >= t) / area, 1) for scores, area in regions])
        points.append((np.mean(normal >= t), spro))
    total = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 < limit <= x1:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit:
            total += (x1 - x0) * (y0 + y1) / 2
    return total / limit


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0.05, 0.3])
def test_against_the_definition(seed, limit):
    rng = np.random.default_rng(seed)
    images = []
    for i in range(4):
        size = (8, 9 + i)  # images may differ in size
        drawn = [rng.random(size) < 0.2 for _ in range(i % 3)]  # they may overlap
        a_map = rng.integers(0, 30, size).astype(np.float32) + 5 * sum(drawn, np.zeros(size))
        kinds = ((0.5, True), (4, False))
        images.append((a_map.astype(np.float32), [saturated(d, *kinds[j % 2]) for j, d in enumerate(drawn)]))
    assert au_spro(images, limit) == pytest.approx(by_definition(images, limit), abs=1e-12)


def test_without_saturation_it_is_pro():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((5, 12, 12), np.float32), np.zeros((5, 12, 12), np.uint8)
    masks[1, 2:6, 2:5] = masks[3, 7:9, 1:11] = 1
    masks[3, 0, 0] = 1  # a region of its own
    alone = np.zeros((12, 12), bool)
    alone[0, 0] = True
    regions = [[], [masks[1] > 0], [], [(masks[3] > 0) & ~alone, alone], []]
    images = [(m, [saturated(d, 1, True) for d in drawn]) for m, drawn in zip(maps, regions, strict=True)]
    assert au_spro(images, 0.3) == pytest.approx(pixel_metrics(maps, masks)["pro"], abs=1e-12)


CONFIG = {255: (32.0, False), 254: (1.0, True)}


class TestFiles:
    def test_masks_say_which_defect(self, masters):
        root = masters["mvtec_loco"] / "pushpins"
        saturation = read_saturation(root / "defects_config.json")
        assert saturation == CONFIG
        logical = region_of(root / "ground_truth/logical_anomalies/000/000.png", saturation)
        structural = region_of(root / "ground_truth/structural_anomalies/000/000.png", saturation)
        assert (logical.saturation, structural.saturation) == (32, 64) and logical.drawn.sum() == 64

    @pytest.mark.parametrize("values", [[0], [7], [254, 255]])
    def test_other_masks(self, tmp_path, values):
        Image.fromarray(np.uint8([[0, *values]])).save(tmp_path / "m.png")
        with pytest.raises(DatasetError, match=r"m.png has the values .*expected one of \[254, 255\]"):
            region_of(tmp_path / "m.png", CONFIG)

    @pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"pixel_value": 255}]', None])
    def test_other_configs(self, tmp_path, text):
        path = tmp_path / "defects_config.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(DatasetError, match=r"defects_config.json cannot be used .*expected a list"):
            read_saturation(path)


def test_the_command(masters, tmp_path, monkeypatch, capfd):
    root = masters["mvtec_loco"]
    monkeypatch.setitem(SPECS, "mvtec_loco", replace(SPECS["mvtec_loco"], counts=COUNTS["mvtec_loco"]))
    flags = [
        "--dataset", "mvtec_loco", "--data-root", str(root), "--quiet", "--output", str(tmp_path / "runs"),
        "--model", "memory-bank", "--backbone", TINY, "--weights", "random", "--device", "cpu",
        "--precision", "fp32", "--eval", "none", "--set", "data.image_size=64",
    ]  # fmt: skip
    assert run_command(train.main, flags) == 0
    runs = sorted(str(path.parent) for path in tmp_path.rglob("last.pt"))
    capfd.readouterr()
    code = run_command(loco_spro.main, [*runs, "--data-root", str(root), "--device", "cpu", "--quiet"])
    out, err = capfd.readouterr()
    assert code == 0, err
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()]
    kinds = ("structural", "logical", "mean")
    assert rows[0] == ["run", "category", *(f"{what}, {k}" for what in ("AU-sPRO", "AUROC") for k in kinds)]
    assert [row[1] for row in rows[2:]] == ["juice_bottle", "pushpins"]
    for row in rows[2:]:
        values = list(map(float, row[2:]))
        for structural, logical, mean in (values[:3], values[3:]):
            assert 0 <= structural <= 100 and 0 <= logical <= 100
            assert mean == pytest.approx((structural + logical) / 2, abs=0.011)
    assert Path(runs[0]).name == rows[2][0]


def test_each_kind_has_an_auroc_of_its_own():
    kinds = ["good", "good", "logical_anomalies", "structural_anomalies"]
    samples = [SimpleNamespace(defect=kind, label=int(kind != "good")) for kind in kinds]
    found = loco_spro.auroc_by_kind(samples, np.array([0.2, 0.4, 0.3, 0.5]))
    assert found == [1, 0.5, 0.75]  # the logical one lies between the two good ones
    assert loco_spro.auroc_by_kind(samples[:3], np.array([0.2, 0.4, 0.3])) == [None, 0.5, None]


def test_runs_of_other_datasets(make_config, monkeypatch, capfd, masters):
    monkeypatch.setattr(loco_spro, "load_detector", lambda *_, **__: SimpleNamespace(config=make_config()))
    code = run_command(loco_spro.main, ["RUN", "--data-root", str(masters["mvtec_loco"])])
    assert code == 2 and "RUN was trained on mvtec; give runs of mvtec_loco" in capfd.readouterr().err
