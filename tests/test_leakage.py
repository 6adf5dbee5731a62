"""scripts/tables/leakage.py: what smoothing and picking add to finished runs."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from evaluation.published_protocol import smooth_in_order
from scripts.tables import leakage
from utils.cli import run_command


def write_run(folder, labels, scores, curve=()):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"curve": list(curve)}))
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = [
            [f"{i}.png", "part", label, "x", score] for i, (label, score) in enumerate(zip(labels, scores))
        ]
        csv.writer(file).writerows([["path", "category", "label", "defect", "score"], *rows])


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.fixture
def noisy():
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [60, 40])
    return labels, (rng.normal(size=100) + labels).round(5)


def test_folder_order_gains_and_shuffling_loses(tmp_path, capfd, noisy):
    labels, scores = noisy
    run = tmp_path / "mvtec/one-class/part/run-s0"
    write_run(run, [*labels, -1], [*scores, 99])  # of an unknown label nothing is known
    write_run(run / "test", labels, scores)  # an evaluation of the same run
    assert run_command(leakage.main, [str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    row = cells(lines[2])
    assert row[:4] == ["mvtec/one-class/part/run-s0", "part", "40", "60"] and lines[3].startswith("~")
    fair, smoothed, shuffled = map(float, row[4:])
    assert fair == pytest.approx(100 * roc_auc_score(labels, scores), abs=0.01)
    assert smoothed == pytest.approx(100 * roc_auc_score(labels, smooth_in_order(scores)), abs=0.01)
    assert smoothed > fair + 10 and shuffled < fair - 5
    assert "evaluations" not in "\n".join(lines)  # no run looked at the test set


def test_best_against_last(tmp_path, capfd, noisy):
    values = (0.25, 0.5, 0.375)
    curve = [
        {"iteration": i, "split": "test", "dsc": None, "pro": v, "image_auroc": 0.9}
        for i, v in enumerate(values)
    ]
    write_run(tmp_path / "picked", *noisy, curve)
    held_out = [entry | {"split": "validation"} for entry in curve]
    write_run(tmp_path / "last", *noisy, held_out)
    assert run_command(leakage.main, [str(tmp_path)]) == 0
    picked = [cells(line) for line in capfd.readouterr().out.splitlines() if "| PRO |" in line]
    assert [row[1:] for row in picked] == [["PRO", "3", "37.50", "50.00", "12.50"]]


def test_nothing_there(tmp_path, capfd):
    write_run(tmp_path / "one-kind", [0, 0, 0], [1, 2, 3])
    assert run_command(leakage.main, [str(tmp_path)]) == 1
    assert "no finished run with scores of both kinds" in capfd.readouterr().err
