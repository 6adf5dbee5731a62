"""Two figures that need no run: what T does to L_SC and L_M, and what smoothing scores does to AUROC.

python -m scripts.figures.theory temperature|smoothing [--output results/figures]

Each writes an SVG and the numbers as CSV, and prints them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean

import numpy as np
from matplotlib.figure import Figure

from datasets.registry import SPECS
from evaluation.figures import COLOURS, subplots, svg
from evaluation.published_protocol import smooth_in_order
from scripts import ROOT
from scripts.text import csv_text, markdown
from utils.cli import new_parser, print_result, run_command, user_path
from utils.files import write_text

Row = list[float | str]
TITLES = {
    "temperature": "d, L_SC and L_M over the temperature T",
    "smoothing": "AUROC of simulated scores before and after smoothing along the list of test images",
}


def main(argv: Sequence[str]) -> None:
    """Draw one of the two figures."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("figure", choices=("temperature", "smoothing"), help="what it shows")
    parser.add_argument(
        "--output", type=user_path, default=ROOT / "results/figures", metavar="DIR", help="for .csv and .svg"
    )
    args = parser.parse_args(argv)
    header, rows, figure = temperature() if args.figure == "temperature" else smoothing()
    lines = [header, *([_text(v) for v in row] for row in rows)]
    write_text(args.output / f"{args.figure}.csv", csv_text(lines))
    write_text(args.output / f"{args.figure}.svg", svg(figure, TITLES[args.figure]))
    print_result(markdown(lines))


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


# --- temperature --------------------------------------------------------------------------------------------

SIZES = (4096, 1024, 256)  # positions N of the three levels at 256 px
TEMPERATURES = np.geomspace(0.02, 4, 60)
LISTED = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def largest_d(n: int, temperature: float, *, everywhere: bool = False) -> float:
    """The largest diagonal entry d of the softmax over n teacher positions (Eq. 9), closed form.

    At a single position: similarity 1 to its own teacher position, -1 to the n - 1 others. `everywhere`: at
    all positions at once, where similarities to the others can be no lower than -1 / (n - 1) on average (the
    corners of a simplex; it takes n - 1 channels or more).
    """
    other = -1 / (n - 1) if everywhere else -1
    return 1 / (1 + (n - 1) * math.exp((other - 1) / temperature))


def temperature() -> tuple[list[str], list[Row], Figure]:
    """d, L_SC = -log d and L_M = 1 - d (tau = 1) of one pair over T: from equal similarities to the bound."""
    header = [
        "N",
        "T",
        "d, equal",
        "d, one position",
        "d, all positions",
        "L_SC, equal",
        "L_SC, all",
        "L_M, all",
    ]
    rows: list[Row] = []
    for n in SIZES:
        for t in LISTED:
            one, every = largest_d(n, t), largest_d(n, t, everywhere=True)
            rows.append([n, t, 1 / n, one, every, math.log(n), -math.log(every), 1 - every])
    quantities: list[tuple[str, str, Callable[[float], float]]] = [
        ("largest d (1 is a perfect match)", "d", lambda d: d),
        ("lowest L_SC of a pair", "-log d", lambda d: -math.log(d)),
        ("lowest L_M of a pair (tau = 1)", "1 - d", lambda d: 1 - d),
    ]
    figure, panels = subplots(len(quantities))
    for axes, (title, label, of) in zip(panels, quantities, strict=True):
        for t in (0.1, 2.0):  # in use: 0.1 (public code, by category) and 2 (paper)
            axes.axvline(t, color="#999999", linestyle="--", linewidth=1)
        for colour, n in zip(COLOURS, SIZES, strict=False):
            for every, style in ((False, "-"), (True, "--")):
                values = [of(largest_d(n, t, everywhere=every)) for t in TEMPERATURES]
                name = f"N = {n}, {'all positions' if every else 'one position'}"
                axes.plot(TEMPERATURES, values, style, color=colour, label=name)
        axes.set(title=title, xlabel="temperature T", ylabel=label, xscale="log", xlim=(0.02, 4))
    panels[0].set(yscale="log", ylim=(1e-4, 1.1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return header, rows, figure


# --- smoothing of image scores ------------------------------------------------------------------------------

RAW = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
TRIALS = 40
# Benchmarks whose image AUROC is published. In the others the normal class comes last by name; here its place
# among the kinds of defects differs by category, and half of these are put before it.
NORMAL_AMONG_DEFECTS = ("mvtec", "mvtec3d")
SIMULATED = ("mvtec", "btad", "visa", "mvtec3d", "vad", "aptos", "oct2017", "isic2018")


def folder_order(dataset: str, normal: int, anomalous: int) -> np.ndarray:
    """Labels (normal + anomalous,) in the order of the test folders, class by class."""
    before = anomalous // 2 if dataset in NORMAL_AMONG_DEFECTS else anomalous
    return np.repeat([1, 0, 1], [before, normal, anomalous - before])


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of scores without ties, by ranks."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    n = int(labels.sum())
    return (float(ranks[labels == 1].sum()) - n * (n + 1) / 2) / (n * (len(labels) - n))


def simulate(dataset: str, raw: float, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean AUROC of a benchmark over categories and trials: raw, smoothed in folder order, and shuffled.

    Scores are normal with variance 1, independent, their means as far apart as AUROC `raw` needs, in the
    benchmark's numbers of test images; smoothed by a Gaussian of sigma 4 along the list.
    """
    rng = np.random.default_rng([seed, *dataset.encode(), round(1000 * raw)])
    gap = math.sqrt(2) * NormalDist().inv_cdf(raw)
    means = []
    for counts in SPECS[dataset].counts.values():
        labels = folder_order(dataset, counts[1], counts[2])
        for _ in range(TRIALS):
            scores = rng.normal(size=len(labels)) + gap * labels
            order = rng.permutation(len(labels))
            smoothed = auroc(smooth_in_order(scores), labels)
            shuffled = auroc(smooth_in_order(scores[order]), labels[order])
            means.append((auroc(scores, labels), smoothed, shuffled))
    unsmoothed, in_order, at_random = (fmean(column) for column in zip(*means, strict=True))
    return unsmoothed, in_order, at_random


def smoothing() -> tuple[list[str], list[Row], Figure]:
    """Raw against smoothed AUROC on every benchmark's numbers of test images, percent."""
    triples_by_name = {name: [simulate(name, raw) for raw in RAW] for name in SIMULATED}
    kinds = ("raw", "folder order", "shuffled")
    rows: list[Row] = [
        [name, *(100 * v for v in values)] for name, triples in triples_by_name.items() for values in triples
    ]
    figure, panels = subplots(2)
    titles = ("smoothed in folder order", "smoothed in shuffled order")
    for axes, place, title in zip(panels, (1, 2), titles, strict=True):
        axes.plot([50, 100], [50, 100], color="#999999", linestyle="--", label="no smoothing")
        for i, (name, triples) in enumerate(triples_by_name.items()):
            curve = 100 * np.array(triples)
            axes.plot(curve[:, 0], curve[:, place], color=(*COLOURS, "#b0a000")[i], label=name)
        axes.set(title=title, xlabel="AUROC of the raw scores, %", ylabel="AUROC after smoothing, %")
        axes.set(xlim=(50, 100), ylim=(50, 100))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return ["benchmark", *kinds], rows, figure


if __name__ == "__main__":
    sys.exit(run_command(main))
