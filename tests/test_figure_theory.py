"""The two figures that need no run."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from losses.similarity import softmax_diagonal
from scripts.figures import theory
from utils.cli import run_command

LEGEND = {"temperature": "N = 256, all positions", "smoothing": "isic2018"}


class TestTemperature:
    def test_the_bound_of_the_printed_temperature(self):
        assert theory.largest_d(256, 2) == pytest.approx(1 / (1 + 255 * math.exp(-1)))

    @pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
    def test_reached_by_features_at_the_bound(self, temperature):
        n = 9
        corners = torch.eye(n) - 1 / n  # a simplex: similarities of -1 / (n - 1)
        features = corners.T.reshape(1, n, 3, 3)
        d = softmax_diagonal(features, features, temperature)
        expected = theory.largest_d(n, temperature, everywhere=True)
        torch.testing.assert_close(d, torch.full_like(d, expected))
        opposite = torch.cat([torch.ones(1), -torch.ones(n - 1)]).reshape(1, 1, 3, 3)
        one = softmax_diagonal(opposite, opposite, temperature)[0, 0]
        assert one.item() == pytest.approx(theory.largest_d(n, temperature), rel=1e-4)


class TestSmoothing:
    def test_orders(self):
        assert theory.folder_order("btad", 2, 3).tolist() == [1, 1, 1, 0, 0]
        assert theory.folder_order("mvtec", 2, 3).tolist() == [1, 0, 0, 1, 1]

    def test_area_by_ranks(self):
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(size=50), np.arange(50) % 3 == 0
        expected = roc_auc_score(labels, scores)
        assert theory.auroc(scores, labels.astype(int)) == pytest.approx(expected)

    def test_folder_order_gains_and_shuffling_does_not(self, monkeypatch):
        monkeypatch.setattr(theory, "TRIALS", 4)
        raw, smoothed, shuffled = theory.simulate("isic2018", 0.8)
        assert raw == pytest.approx(0.8, abs=0.05)
        assert smoothed > 0.97 and shuffled < 0.75
        assert theory.simulate("isic2018", 0.8) == (raw, smoothed, shuffled)


@pytest.mark.slow
def test_commands(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(theory, "TRIALS", 1)
    for name in ("temperature", "smoothing"):
        assert run_command(theory.main, [name, "--output", str(tmp_path)]) == 0
        words = "".join(ElementTree.parse(tmp_path / f"{name}.svg").getroot().itertext())
        assert theory.TITLES[name] in words and LEGEND[name] in words
        lines = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert len(capfd.readouterr().out.splitlines()) == len(lines) + 1
    assert lines[0] == "benchmark,raw,folder order,shuffled" and len(lines) == 1 + 8 * 11
