"""What people read of an evaluation: heatmaps.png, clips.png and report.html, one self-contained file."""

import base64
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
import yaml
from sklearn.metrics import roc_curve

from datasets.loader import ImageSet, evenly_spread
from evaluation import figures
from evaluation.metrics import Curve, Results, few_points
from evaluation.metrics_by_task import segmentation_metrics
from evaluation.results import protocol_notes, table_cells
from evaluation.scoring import Scores, row_name
from utils.config import Config
from utils.device import choose_device, versions
from utils.files import write_text
from utils.runs import git_sha

MISTAKES, GALLERY = 6, 60  # pictures of each kind of mistake, and in the gallery
SIDE = 160  # pixels, longer side of a picture
TEMPLATE = Path(__file__).with_name("report.html")

_log = logging.getLogger("uninet")


@dataclass(frozen=True)
class Report:
    """What a page is made of. `pixels` gives the image (H, W, 3) uint8 of a sample by its place."""

    title: str
    scores: Scores
    pixels: Callable[[int], np.ndarray]
    results: Mapping[str, Results]
    notes: Sequence[str]
    facts: Mapping[str, str]
    settings: Mapping[str, object]

    @cached_property
    def value(self) -> tuple[str, np.ndarray]:
        """What ranks the images, and it (N,): the score, or Dice of a segmentation if all show a defect."""
        scores = self.scores
        if scores.kind != "segmentation" or scores.masks is None or (scores.labels == 0).any():
            return "score", scores.score
        pairs = zip(scores.maps, scores.masks, strict=True)
        return "Dice", np.array([segmentation_metrics(p[None], m[None])["dsc"] for p, m in pairs])

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Map values shown as coldest and hottest colour."""
        return figures.colour_scale(self.scores.maps, self.scores.labels)


def write_pages(
    folder: Path,
    config: Config,
    data: ImageSet,
    scores: Scores,
    results: dict[str, Results],
    *,
    command: str,
    step: int,
) -> figures.Picture | None:
    """Write the pictures and the report, after the numbers; return the page of heatmaps.

    The model is as of `step`. A failure here is a warning and returns None: it must not cost a training.
    """
    try:
        heatmaps = figures.example_page(data, scores, 8)
        figures.write_png(folder / "heatmaps.png", heatmaps)
        if scores.kind == "video":
            figures.write_png(folder / "clips.png", figures.clip_page(scores))
        model, made_with = config.model, versions(choose_device(config.run.device))
        facts = {
            "command": command,
            "backbone": model.backbone,
            "training": f"{step} steps of {config.train.batch_size}, {config.train.precision}",
            "prediction": f"{scores.ms_per_image:.1f} ms per image",
            "code": git_sha(),
            "versions": ", ".join(f"{name} {version}" for name, version in made_with.items()),
        }
        title = f"{model.name} ({model.flavor}) on {config.data.name}/{config.data.category}, {model.setting}"
        notes = protocol_notes(config, step)
        report = Report(title, scores, data.pixels, results, notes, facts, config.to_dict())
        write_text(folder / "report.html", page(report))
    except Exception as error:
        _log.debug("pictures and report", exc_info=True)
        _log.warning(
            "pictures and report.html of %s are not complete (%s: %s); scores.csv and metrics.json are",
            folder, type(error).__name__, error,
        )  # fmt: skip
        return None
    return heatmaps


def page(report: Report) -> str:
    """The whole HTML document."""
    from jinja2 import Environment, StrictUndefined  # takes a quarter of a second to import

    what, values = report.value
    head, rows, marks = table_cells(report.results)
    images = [f"{r['n_normal']} normal, {r['n_anomalous']} anomalous" for r in report.results.values()]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=report.title,
        columns=[*head, "images"],
        rows=[[*row, count] for row, count in zip(rows, images, strict=False)],  # the mean may not be shown
        notes=[*marks, *report.notes],
        plots=_plots(report),
        mistakes=[(heading, _cards(report, chosen)) for heading, chosen in _mistakes(report)],
        gallery=_cards(report, evenly_spread(range(len(values)), GALLERY)),
        count=len(values),
        what=what,
        facts=report.facts,
        settings=yaml.safe_dump(dict(report.settings), sort_keys=False),
    )


def _plots(report: Report) -> Iterator[tuple[str, str]]:
    """Caption and SVG (as a data URL) of each curve: ROC, PRO and histogram of each category."""
    scores, (what, values) = report.scores, report.value
    for category in dict.fromkeys(s.category for s in scores.samples if s.label >= 0):
        part = np.array([s.category == category and s.label >= 0 for s in scores.samples])
        labels, name = scores.labels[part], row_name(category)
        results = report.results[name]
        both = 0 < labels.sum() < len(labels)
        if both:
            fpr, tpr, _ = roc_curve(labels, values[part])
            caption = f"{name}: ROC of images, area: {100 * (results['image_auroc'] or 0):.2f} %"
            yield caption, _curve(few_points(fpr, tpr), ("FPR", "TPR"), chance=True)
        points = scores.pro_curves.get(category)  # none where all masks are empty
        if both and points and scores.kind != "segmentation":
            caption = f"{name}: PRO, area up to 30 % FPR: {100 * (results['pro'] or 0):.2f} %"
            yield caption, _curve(points, ("FPR of pixels", "mean overlap per region"), limit=0.3)
        yield f"{name}: {what} of images", _histogram(what, values[part], labels)


def _curve(points: Curve, names: tuple[str, str], *, limit: float = 1.0, chance: bool = False) -> str:
    figure, (axes,) = figures.subplots()
    if chance:
        axes.plot([0, 1], [0, 1], color="#999999", linestyle="--")
    axes.plot(*zip(*points, strict=True))
    axes.set(xlabel=names[0], ylabel=names[1], xlim=(0, limit), ylim=(0, 1.01))
    return _data_url("svg+xml", figures.svg(figure).encode())


def _histogram(what: str, values: np.ndarray, labels: np.ndarray) -> str:
    """Values of normal and anomalous images, in shares of their number."""
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high + 1e-12 + 1e-6 * abs(high), 31)
    figure, (axes,) = figures.subplots()
    for label, kind in enumerate(("normal", "anomalous")):
        chosen = values[labels == label]
        if len(chosen):
            shares = np.histogram(chosen, edges)[0] / len(chosen)
            axes.stairs(shares, edges, fill=True, alpha=0.6, color=figures.COLOURS[label], label=kind)
    axes.set(xlabel=what, ylabel="share of its images")
    axes.legend()
    return _data_url("svg+xml", figures.svg(figure).encode())


def _mistakes(report: Report) -> list[tuple[str, list[int]]]:
    """Headings and the images below them; empty where only one kind of image was evaluated."""
    labels, (what, values) = report.scores.labels, report.value
    order = np.argsort(values)
    if what == "Dice":
        return [("Images with the lowest Dice", order[:MISTAKES].tolist())]
    missed = order[labels[order] == 1][:MISTAKES].tolist()
    alarms = order[labels[order] == 0][::-1][:MISTAKES].tolist()
    if not missed or not alarms:
        return []
    headings = ("Anomalous images with the lowest scores", "Normal images with the highest scores")
    return list(zip(headings, (missed, alarms), strict=True))


def _cards(report: Report, chosen: Sequence[int]) -> list[dict[str, str | int]]:
    """Pictures of images, and what the page says about each."""
    scores, (what, values) = report.scores, report.value
    cards: list[dict[str, str | int]] = []
    for i in chosen:
        sample, shown = scores.samples[i], f"{values[i]:.4g}"
        file = "/".join(sample.path.parts[-2:])  # items and clips name theirs alike
        image = figures.outlined(report.pixels(i), None if scores.masks is None else scores.masks[i])
        about = f"{sample.category} {sample.defect} {file}, {what} {shown}"
        cards.append({
            "place": i,
            "value": f"{values[i]:.6g}",
            "shown": shown,
            "kind": {0: "normal", 1: sample.defect}.get(sample.label, "unknown"),
            "file": file,
            "alt": about,
            "picture": _jpeg(np.hstack([image, figures.heatmap(scores.maps[i], report.scale)])),
        })  # fmt: skip
    return cards


def _jpeg(pair: figures.Picture) -> str:
    """Image and heatmap side by side as a small JPEG."""
    height, width = pair.shape[:2]
    factor = SIDE / max(height, width / 2)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = cv2.resize(pair, size, interpolation=cv2.INTER_AREA)
    encoded = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return _data_url("jpeg", encoded.tobytes())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
