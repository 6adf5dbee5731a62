"""AUPIMO and UniAS's Dice: known answers, and slow references that look at every threshold."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from sklearn.metrics import f1_score, precision_recall_curve

from datasets.samples import Sample
from evaluation.metrics_by_task import aupimo, unias_dice
from evaluation.scoring import Scores, results_by_category

LABELS = np.array([0, 0, 0, 1, 1])


def maps_and_masks(seed, shape=(24, 32), decimals=None):
    rng = np.random.default_rng(seed)
    masks = np.zeros((5, *shape), np.uint8)
    masks[3, 2:9, 3:8], masks[4, 10:13, 1:30] = 1, 1
    maps = rng.normal(size=masks.shape) + 2.5 * masks
    return (maps if decimals is None else maps.round(decimals)).astype(np.float32), masks


def dense_aupimo(maps, masks, limits, points=2000):
    """At many rates: the lowest threshold with at most that share of normal pixels above, then the recall."""
    normal = np.sort(maps[LABELS == 0].ravel())
    candidates = np.append(-np.inf, np.unique(normal))
    false_alarms = 1 - np.searchsorted(normal, candidates, side="right") / normal.size
    values = []
    for a, m in zip(maps[LABELS == 1], masks[LABELS == 1]):
        exponents = np.linspace(math.log10(limits[0]), math.log10(limits[1]), points)
        lowest = [candidates[false_alarms <= rate + 1e-12].min() for rate in 10**exponents]
        values.append(np.mean([(a[m > 0] > t).mean() for t in lowest]))
    return np.mean(values)


class TestAupimo:
    @pytest.mark.parametrize("decimals", [None, 1])
    def test_agrees_with_a_dense_sweep(self, decimals):
        maps, masks = maps_and_masks(1, decimals=decimals)  # 2304 normal pixels
        for limits in ((1e-3, 1e-1), (3e-4, 2e-3)):
            fast = aupimo(maps, masks, LABELS, limits=limits)
            assert fast == pytest.approx(dense_aupimo(maps, masks, limits), abs=2e-3)
            assert 0.02 < fast < 0.98

    def test_known_answers(self):
        maps, masks = maps_and_masks(2)
        assert aupimo(masks.astype(np.float32), masks, LABELS) == pytest.approx(1)
        assert aupimo(np.zeros_like(maps), masks, LABELS) == 0.0  # nothing is above a tie
        assert aupimo(-masks.astype(np.float32), masks, LABELS) == 0.0
        half = masks.astype(np.float32)
        half[3] = 0  # one of the two anomalous images is missed
        assert aupimo(half, masks, LABELS) == pytest.approx(0.5)

    def test_only_normal_images_make_false_alarms(self):
        maps, masks = maps_and_masks(3)
        loud = maps.copy()
        loud[3][masks[3] == 0] = 100
        assert aupimo(loud, masks, LABELS) == aupimo(maps, masks, LABELS)
        loud = masks.astype(np.float32)
        loud[0, 0, :4] = 2  # more than 1e-3 of the normal pixels, less than 1e-1
        wide = aupimo(loud, masks, LABELS, limits=(1e-3, 1e-1))
        assert wide == pytest.approx(1 - math.log(4 / 2304 / 1e-3) / math.log(100), abs=1e-9)

    def test_order_and_scale_change_nothing(self):
        maps, masks = maps_and_masks(4)
        order = np.array([4, 2, 0, 3, 1])
        limits = (1e-3, 1e-1)
        expected = aupimo(maps, masks, LABELS, limits=limits)
        assert aupimo(maps[order], masks[order], LABELS[order], limits=limits) == pytest.approx(expected)
        assert aupimo(np.exp(maps), masks, LABELS, limits=limits) == pytest.approx(expected)

    def test_undefined_and_mistakes(self):
        maps, masks = maps_and_masks(5)
        assert aupimo(maps[:3], masks[:3], LABELS[:3]) is None
        assert aupimo(maps[3:], masks[3:], LABELS[3:]) is None
        with pytest.raises(ValueError, match="must increase"):
            aupimo(maps, masks, LABELS, limits=(1e-2, 1e-3))
        with pytest.raises(ValueError, match="do not fit"):
            aupimo(maps[:3], masks, LABELS)


class TestUniasDice:
    @pytest.mark.parametrize("decimals", [None, 1])
    def test_agrees_with_every_threshold(self, decimals):
        maps, masks = maps_and_masks(1, (8, 12), decimals)
        masks[4, 6:8, 1:9] = 1
        best = max(
            np.unique(maps),
            key=lambda t: ((maps >= t) & (masks > 0)).sum() * (1 / (maps >= t).sum() + 1 / masks.sum()),
        )
        dice = []
        for a, m in zip(maps >= best, masks):
            empty = not a.any() and not m.any()
            dice.append(1.0 if empty else f1_score(m.ravel(), a.ravel(), zero_division=0))
        assert unias_dice(maps, masks) == pytest.approx(np.mean(dice))

    def test_equals_a_sort_of_all_pixels(self, monkeypatch):
        """To the last digits, also where the curves of other metrics merge neighbouring scores."""
        monkeypatch.setattr("evaluation.metrics.MAX_LEVELS", 5)
        rng = np.random.default_rng(7)
        for decimals in (1, 2, 8):
            maps = rng.normal(size=(4, 9, 11)).round(decimals).astype(np.float32)
            masks = (rng.random(maps.shape) < 0.2).astype(np.uint8)
            precision, recall, thresholds = precision_recall_curve(masks.ravel(), maps.ravel())
            positive = maps >= thresholds[np.argmax((precision + recall)[:-1])]
            sums = positive.sum((1, 2)) + masks.sum((1, 2))
            dice = np.where(sums == 0, 1, 2 * (positive & (masks > 0)).sum((1, 2)) / np.maximum(sums, 1))
            assert unias_dice(maps, masks) == pytest.approx(dice.mean(), abs=1e-12)

    def test_known_answers(self):
        masks = maps_and_masks(2)[1]
        assert unias_dice(masks.astype(np.float32), masks) == 1.0
        loud = masks.astype(np.float32)
        loud[0, 0, 0] = 2  # one alarm in one of three normal images
        assert unias_dice(loud, masks) == pytest.approx(4 / 5)
        assert unias_dice(loud, np.zeros_like(masks)) is None


@pytest.mark.parametrize(("masks", "left"), [(True, ["soft_dsc"]), (False, ["aupimo", "soft_dsc"])])
def test_what_cannot_be_measured_is_told(make_config, caplog, masks, left):
    samples = [Sample(Path("x"), label, None, "a", "test", "x", "x") for label in LABELS]
    maps, truth = maps_and_masks(6)
    scores = Scores(samples, maps.max(axis=(1, 2)), maps, truth if masks else None, 1.0)
    asked = dataclasses.replace(make_config().run, extra_metrics=("aupimo", "soft_dsc"))
    found = results_by_category(scores, asked)["a"]
    assert [r.getMessage().split()[0] for r in caplog.records if "left out" in r.getMessage()] == left
    assert ("aupimo" in found) is masks and not {"dsc_soft", "miou_soft"} & set(found)


def test_in_the_results_of_a_run_and_of_test(mvtec_like, tmp_path, capfd):
    import test as test_command
    import train as train_command
    from utils.cli import run_command

    argv = ["--data-root", str(mvtec_like), "--category", "part", "--backbone", TINY]
    argv += ["--iterations", "1", "--output", str(tmp_path), "--quiet", "--precision", "fp32"]
    for setting in ("data.image_size=64", "model.weights=random", "train.batch_size=2"):
        argv += ["--set", setting]
    assert run_command(train_command.main, [*argv, "--extra-metrics", "aupimo"]) == 0
    assert "AUPIMO" in capfd.readouterr().out
    (path,) = tmp_path.rglob("metrics.json")
    tree = json.loads(path.read_text())
    assert 0 <= tree["results"]["part"]["aupimo"] <= 1 and "dsc_unias" not in tree["results"]["part"]
    assert 1e5 < tree["bottleneck_parameters"] < tree["parameters"]
    assert run_command(train_command.main, argv) == 0  # the same run
    argv = ["--checkpoint", str(path.parent), "--quiet", "--extra-metrics", "aupimo", "dsc_unias"]
    assert run_command(test_command.main, argv) == 0
    tested = json.loads((path.parent / "test/metrics.json").read_text())["results"]["part"]
    assert tested["aupimo"] == pytest.approx(tree["results"]["part"]["aupimo"], abs=0.05)
    assert 0 <= tested["dsc_unias"] <= 1
