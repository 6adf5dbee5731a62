"""Figures of the paper that are made of runs: train what is missing, then draw.

python -m scripts.figures.reproduce 03 --data DIR     # DIR/mvtec, DIR/btad, ...; 01c 03 04 05 06 07

Finished runs are found and reused; --dry-run lists them and needs no data. What a figure shows stands in
scripts/figures/figures.yaml.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score, roc_curve

from datasets.build import build_test
from datasets.loader import ImageSet, batches
from datasets.registry import SPECS
from evaluation.figures import (
    COLOURS,
    Picture,
    evenly_spread,
    heatmap_page,
    subplots,
    svg,
    write_on,
    write_png,
)
from evaluation.scoring import collect_scores
from model import Detector, load_detector
from model.inference import inputs_of, to_device
from model.uninet import UniNet
from scripts import ROOT
from scripts.tables import reproduce as tables
from utils.cli import new_parser, print_result, run_command, user_path, when_stopped
from utils.config import Config
from utils.errors import ConfigError
from utils.files import write_text
from utils.yaml_io import Tree, read_yaml

CALM = 12  # normal images that set the colour scale of a row
POINTS = 400  # test images of a t-SNE
FIGURES = ROOT / "scripts/figures/figures.yaml"


@dataclasses.dataclass(frozen=True)
class Place:
    """What a panel, or a row of pictures, shows: a run, and what it is called."""

    title: str
    row: str
    run: tables.Run


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("figure", choices=list(read_yaml(FIGURES)), help="its number in the paper")
    tables.add_run_flags(parser)
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME", help="only these models of the figure (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the runs")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="pictures in a row of a grid")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="for drawing")
    parser.add_argument(
        "--output", type=user_path, default=ROOT / "results/figures", metavar="DIR", help="for the picture"
    )
    return parser.parse_args(argv)


@when_stopped("the same command goes on from the last checkpoint")
def main(argv: Sequence[str]) -> None:
    """Train what is missing and draw one figure.

    Raises:
        ConfigError: if nothing is left to show, or --data is missing.
    """
    args = parse_arguments(argv)
    spec = read_yaml(FIGURES)[args.figure]
    places = places_of(spec, args)
    if not places:
        raise ConfigError(f"figure {args.figure} has nothing by these --datasets, --categories and --rows")
    if args.dry_run:
        print_result("\n".join(tables.commands([p.run for p in places], args)))
        return
    if args.data is None:
        raise ConfigError("where are the datasets? Give the folder that holds them with --data DIR")
    for run in dict.fromkeys(p.run for p in places):
        tables.train(run, args)
    kind, path = spec["kind"], args.output / f"figure{args.figure}"
    if kind == "grid":
        path = path.with_suffix(".png")
        write_png(path, grid(places, args))
    else:
        path = path.with_suffix(".svg")
        draw, about = PLOTS[kind]
        write_text(path, svg(draw(places, args), about))
    print_result(str(path))


def places_of(spec: Tree, args: argparse.Namespace) -> list[Place]:
    """Every place of a figure with each of its models, as far as the command line asks for them."""
    places = []
    for entry in spec["places"]:
        name = entry["dataset"]
        for category in map(str, entry.get("categories", SPECS[name].counts)):
            for row, flags in spec["rows"].items():
                asked = (not chosen or found in chosen for found, chosen in (
                    (name, args.datasets), (category, args.categories), (row, args.rows)
                ))  # fmt: skip
                if all(asked):
                    words = (*map(str, entry.get("flags", ())), *map(str, flags))
                    title = name if name == category else f"{name} {category}"
                    places.append(Place(title, row, tables.Run(name, category, words, args.seed)))
    return places


def _by_title(places: Sequence[Place]) -> dict[str, list[Place]]:
    by_title: dict[str, list[Place]] = {}
    for place in places:
        by_title.setdefault(place.title, []).append(place)
    return by_title


# --- curves -------------------------------------------------------------------------------------------------


def roc(places: Sequence[Place], args: argparse.Namespace) -> Figure:
    """TPR over FPR of images: one panel per dataset, one curve per model, its area in the legend."""
    by_title, rows = _by_title(places), list(dict.fromkeys(p.row for p in places))
    figure, panels = subplots(len(by_title))
    for axes, (title, group) in zip(panels, by_title.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", linestyle="--", label="chance")
        for place in group:
            labels, scores = read_scores(tables.folder_of(place.run, args) / "scores.csv")
            fpr, tpr, _ = roc_curve(labels, scores)
            name = f"{place.row}: {100 * roc_auc_score(labels, scores):.2f} %"
            axes.plot(fpr, tpr, color=COLOURS[rows.index(place.row) % len(COLOURS)], label=name)
        axes.set(title=title, xlabel="FPR", ylabel="TPR", xlim=(0, 1), ylim=(0, 1.01))
        axes.legend(fontsize=7)
    return figure


def read_scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores, (N,) each, of the images of known label in a run's scores.csv."""
    with path.open(newline="") as file:
        rows = [(int(r["label"]), float(r["score"])) for r in csv.DictReader(file) if int(r["label"]) >= 0]
    labels, scores = zip(*rows, strict=True)
    return np.array(labels), np.array(scores)


# --- pictures -----------------------------------------------------------------------------------------------


def load_run(folder: Path, root: Path, device: str) -> tuple[Detector, ImageSet]:
    """The model of a run, and its test set below `root`."""

    def moved(config: Config) -> Config:
        return dataclasses.replace(config, run=dataclasses.replace(config.run, data_root=str(root)))

    detector = load_detector(folder, device=device, change=moved)
    return detector, build_test(detector.config, detector.config, detector.normalise)[0]


def grid(places: Sequence[Place], args: argparse.Namespace) -> Picture:
    """A row of anomalous images with map and mask for every place and model, below each other."""
    strips = []
    for place in places:
        folder, root = tables.folder_of(place.run, args), args.data / place.run.dataset
        detector, data = load_run(folder, root, args.device)
        labels = np.array([s.label for s in data.samples])
        shown = evenly_spread(np.flatnonzero(labels == 1).tolist(), args.images)
        part = [*shown, *evenly_spread(np.flatnonzero(labels == 0).tolist(), CALM)]
        images = ImageSet([data.samples[i] for i in part], data.decode, data.normalise)
        scores = collect_scores(detector.predictions(images, quiet=args.quiet), images)
        chosen = list(range(len(shown)))
        page = heatmap_page([images.pixels(i) for i in chosen], scores, chosen)
        strips.append(_titled(page, f"{place.title}: {place.row}"))
    width = max(s.shape[1] for s in strips)
    strips = [np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return np.vstack(strips)


def _titled(page: Picture, text: str) -> Picture:
    strip = np.full((22, page.shape[1], 3), 255, np.uint8)
    write_on(strip, text, (3, 16), 0.45)
    return np.vstack([strip, page])


# --- features -----------------------------------------------------------------------------------------------


def tsne(places: Sequence[Place], args: argparse.Namespace) -> Figure:
    """t-SNE of one vector per test image: means over positions of the student's features, levels joined.

    The paper does not say which features it shows; these are our choice. One panel per place and model; axes
    have no unit.
    """
    figure, panels = subplots(len(places), columns=len({p.row for p in places}))
    for axes, place in zip(panels, places, strict=True):
        folder, root = tables.folder_of(place.run, args), args.data / place.run.dataset
        detector, data = load_run(folder, root, args.device)
        chosen = evenly_spread(range(len(data)), POINTS)
        part = ImageSet([data.samples[i] for i in chosen], data.decode, data.normalise)
        labels = np.array([s.label for s in part.samples])
        assert isinstance(detector.model, UniNet)  # features of others are no such pairs
        flat = embed(image_features(detector.model, part, detector.device))
        for label, name in enumerate(("normal images", "anomalous images")):
            x, y = flat[labels == label].T
            axes.scatter(x, y, s=9, alpha=0.6, color=COLOURS[label], label=name)
        axes.set(title=f"{place.title}, {place.row}", xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


@torch.inference_mode()
def image_features(model: UniNet, data: ImageSet, device: torch.device) -> np.ndarray:
    """(N, sum of C_i), unit length: means over positions of what the student restores of the source."""
    vectors = []
    for batch in batches(data, 16):
        pairs = model.features(inputs_of(to_device(batch, device)))
        levels = [student.float().mean(dim=(2, 3)) for _, _, student in pairs[: len(pairs) // 2]]
        joined = torch.cat([torch.nn.functional.normalize(f, dim=1) for f in levels], dim=1)
        vectors.append(torch.nn.functional.normalize(joined, dim=1).cpu().numpy())
    return np.concatenate(vectors)


def embed(features: np.ndarray) -> np.ndarray:
    """(N, D) to (N, 2) in [0, 1], by t-SNE; the same for the same features."""
    perplexity = min(30, (len(features) - 1) / 3)
    flat = TSNE(perplexity=perplexity, random_state=0, init="pca").fit_transform(features)
    low, high = flat.min(axis=0), flat.max(axis=0)
    return 0.03 + 0.94 * (flat - low) / np.maximum(high - low, 1e-9)


PLOTS = {
    "roc": (roc, "ROC curves of image scores"),
    "tsne": (tsne, "t-SNE of features of test images, normal and anomalous"),
}


if __name__ == "__main__":
    sys.exit(run_command(main))
