"""What two habits add to finished runs: smoothing scores along the list, and picking on the test set.

python -m scripts.tables.leakage checkpoints [--shuffles 20]

The first table: image AUROC of a run's scores.csv as they are (fair), smoothed by a Gaussian of sigma 4 in
folder order, and in shuffled order. The second, of runs with --select best: the best evaluation on the test
set against the last one. Neither habit is a fair protocol; test.py --protocol april-2025 recomputes the rest.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from sklearn.metrics import roc_auc_score

from evaluation.published_protocol import smooth_in_order
from evaluation.results import COLUMNS
from scripts import ROOT
from scripts.text import markdown
from train import CRITERIA
from utils.cli import new_parser, print_result, run_command, user_path
from utils.yaml_io import Tree

Cells = list[str]


def main(argv: Sequence[str]) -> None:
    """Print both tables for every finished run below the given folders.

    Raises:
        ValueError: if there is none with scores of both kinds of images.
    """
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "runs",
        nargs="*",
        type=user_path,
        default=[ROOT / "checkpoints"],
        metavar="DIR",
        help="with runs below",
    )
    parser.add_argument("--shuffles", type=int, default=20, metavar="N", help="orders that are averaged over")
    args = parser.parse_args(argv)
    folders = [folder for top in args.runs for folder in finished(top)]
    smoothed = [row for folder in folders for row in smoothing_rows(folder, args.shuffles)]
    if not smoothed:
        raise ValueError(f"no finished run with scores of both kinds below {', '.join(map(str, args.runs))}")
    head = ["run", "category", "normal", "anomalous", "fair", "in folder order~", "in shuffled order~"]
    print_result(markdown([head, *smoothed]))
    print_result("~ smoothed along the list, percent: not a fair protocol\n")
    picked = [row for folder in folders if (row := picking_row(folder))]
    if picked:
        print_result(
            markdown([["run", "metric", "evaluations", "last", "best on the test set", "gain"], *picked])
        )
        print_result("the best of several evaluations on the test set, percent: not a fair protocol")


def finished(top: Path) -> list[Path]:
    """Finished run folders at or below `top`; evaluations that test.py keeps inside a run are left out."""
    folders = sorted(path.parent for path in top.rglob("metrics.json"))
    return [f for f in folders if not (f.parent / "metrics.json").is_file() and (f / "scores.csv").is_file()]


def smoothing_rows(folder: Path, shuffles: int) -> list[Cells]:
    """One row per category that has normal and anomalous images.

    The lines of scores.csv are in folder order: class by class and name by name, video clip by clip, frame by
    frame.
    """
    by_category: dict[str, list[tuple[int, float]]] = {}
    with (folder / "scores.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["label"]) >= 0:
                by_category.setdefault(row["category"], []).append((int(row["label"]), float(row["score"])))
    rows = []
    for category, pairs in by_category.items():
        labels, scores = (np.array(column) for column in zip(*pairs, strict=True))
        if 0 < labels.sum() < len(labels):
            numbers = [str(len(labels) - labels.sum()), str(labels.sum())]
            values = [f"{100 * v:.2f}" for v in three_aurocs(labels, scores, shuffles)]
            rows.append([_name(folder), category, *numbers, *values])
    return rows


def three_aurocs(labels: np.ndarray, scores: np.ndarray, shuffles: int) -> tuple[float, float, float]:
    """AUROC of scores (N,) in folder order: as they are, smoothed, and smoothed in shuffled orders (mean)."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(labels)) for _ in range(shuffles)]
    shuffled = [roc_auc_score(labels[order], smooth_in_order(scores[order])) for order in orders]
    smoothed = roc_auc_score(labels, smooth_in_order(scores))
    return float(roc_auc_score(labels, scores)), float(smoothed), fmean(shuffled)


def picking_row(folder: Path) -> Cells | None:
    """Last and best evaluation on the test set of a run that looked at it; None for others."""
    tree: Tree = json.loads((folder / "metrics.json").read_text())
    looked = [entry for entry in tree.get("curve", []) if entry.get("split") == "test"]
    if not looked:
        return None
    metric = next(name for name in CRITERIA if looked[0].get(name) is not None)
    values = [100 * entry[metric] for entry in looked]
    last, best = values[-1], max(values)
    return [
        _name(folder), COLUMNS[metric], str(len(values)), f"{last:.2f}", f"{best:.2f}", f"{best - last:.2f}"
    ]  # fmt: skip


def _name(folder: Path) -> str:
    return "/".join(folder.parts[-4:])  # dataset, setting, category, run


if __name__ == "__main__":
    sys.exit(run_command(main))
