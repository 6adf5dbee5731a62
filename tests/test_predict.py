"""Predictions on new images: p-values, decisions, files, mistakes."""

import csv

import numpy as np
import pytest
from PIL import Image

import predict as predict_command
import train as train_command
from utils.calibration import Calibration, calibrate
from utils.cli import run_command
from utils.evaluation import Scores

FLAGS = [
    "--config", "configs/folder.yaml", "--category", "part", "--precision", "fp32", "--device", "cpu",
    "--quiet", "--model", "memory-bank", "--set", "data.image_size=64",
    "--set", "data.calibration_fraction=0.4",
]  # fmt: skip


class TestPValues:
    def test_by_hand(self):
        calibration = Calibration((3.0, 1.0, 2.0, 2.0), 0.0, 1.0)
        assert calibration.p_values(np.array([0.0, 2.0, 2.5, 9.0])).tolist() == [1.0, 0.8, 0.4, 0.2]
        assert calibration.smallest_rate() == 0.2

    @pytest.mark.parametrize("rate", [0.05, 0.2])
    def test_false_alarms_of_exchangeable_normals(self, rate):
        """Over many splits, the share of new normals flagged is at most the rate, and near it."""
        rng = np.random.default_rng(0)
        flagged = []
        for _ in range(2000):
            scores = rng.gamma(2.0, size=60)
            calibration = Calibration(tuple(scores[:59]), 0.0, 1.0)
            flagged.append(calibration.p_values(scores[59:])[0] <= rate)
        spread = 3 * np.sqrt(rate * (1 - rate) / 2000)
        assert rate - spread - 1 / 60 < np.mean(flagged) < rate + spread

    def test_scale_keeps_normals_in_the_lower_half(self):
        maps = np.random.default_rng(0).random((5, 16, 16)).astype(np.float32)
        calibration = calibrate(Scores([], maps.max((1, 2)), maps, None, 0.0))
        assert (np.quantile(maps, 0.999) - calibration.low) / (
            calibration.high - calibration.low
        ) <= 0.5 + 1e-6


@pytest.fixture
def run(mvtec_like, tmp_path, capfd):
    """A fitted memory bank; gives a function that runs predict.py: (exit code, stdout, stderr)."""
    train = ["--data-root", str(mvtec_like), "--output", str(tmp_path / "runs"), "--name", "r", *FLAGS]
    assert run_command(train_command.main, train) == 0
    folder = tmp_path / "runs/folder/one-class/part/r"
    capfd.readouterr()

    def call(*flags):
        argv = ["--checkpoint", str(folder), "--device", "cpu", "--output", str(tmp_path / "out"), *flags]
        return run_command(predict_command.main, argv), *capfd.readouterr()

    return call


def test_a_folder(run, mvtec_like, tmp_path):
    code, out, _ = run(str(mvtec_like / "part/test"), "--false-alarm-rate", "0.2")
    assert code == 0 and "9 images, most anomalous first" in out
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").open()))
    assert len(rows) == 9 and {row["label"] for row in rows} == {"-1"}
    assert {row["path"] for row in rows if row["is_anomalous"] == "1"} >= {"spot/000.png", "dot/8.bmp"}
    picture = Image.open(tmp_path / "out/heatmaps/spot/000.png")
    assert picture.size == (3 * 64, 64)
    trained = list(csv.DictReader((tmp_path / "runs/folder/one-class/part/r/scores.csv").open()))
    assert "p_value" in trained[0]
    by_path = {row["path"]: float(row["score"]) for row in trained}
    for row in rows:  # one scoring path
        assert float(row["score"]) == pytest.approx(by_path[f"part/test/{row['path']}"], rel=1e-4)


def test_one_image_and_too_few_normals(run, mvtec_like, tmp_path):
    code, out, err = run(str(mvtec_like / "part/test/spot/000.png"))
    assert code == 0 and "0 flagged" in out and "hold out more" in err
    assert (tmp_path / "out/heatmaps/000.png").is_file()


def test_mistakes(run, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(str(tmp_path / "empty"))
    assert code == 1 and "no image at" in err
    code, _, err = run(str(tmp_path), "--false-alarm-rate", "2")
    assert code == 2 and "between 0 and 1" in err
