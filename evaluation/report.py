"""report.html: one self-contained page of a run: metrics, curves, mistakes, gallery, settings."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import cv2
import numpy as np
import yaml
from sklearn.metrics import roc_curve

from evaluation.figures import colour_scale, heatmap
from evaluation.metrics import Curve, Results, few_points, segmentation_metrics
from evaluation.scoring import COLUMNS, FOOTNOTES, Scores, row_name
from utils.files import write_text

MISTAKES, GALLERY = 6, 60  # pictures of each kind of mistake, and in the gallery
SIDE = 160  # pixels, longer side of a picture
WIDTH, HEIGHT, MARGIN = 300, 220, 36  # of a plot


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


def write_report(path: Path, report: Report) -> None:
    """Write the page in one step."""
    write_text(path, page(report))


def page(report: Report) -> str:
    """The whole HTML document."""
    sections = [
        _section("Results", _results(report)),
        _section("Curves", _curves(report)),
        _section("Mistakes", _mistakes(report)),
        _section("Gallery", _gallery(report)),
        _section("Settings and versions", _settings(report)),
    ]
    return TEMPLATE.format(title=escape(report.title), style=STYLE, body="\n".join(sections), script=SCRIPT)


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{content}</section>'


# --- results ------------------------------------------------------------------------------------------------


def _results(report: Report) -> str:
    results = report.results
    shown = {k: n for k, n in COLUMNS.items() if any(r.get(k) is not None for r in results.values())}
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in ("category", *shown.values(), "images"))
    rows = []
    for name, values in results.items():
        if name == "mean" and len(results) == 2:
            continue
        cells = ["" if values.get(k) is None else f"{100 * values[k]:.2f}" for k in shown]
        cells.append(f"{values['n_normal']} normal, {values['n_anomalous']} anomalous")
        data = "".join(f"<td>{c}</td>" for c in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{data}</tr>')
    marks = [f"{m} {text}" for m, text in FOOTNOTES.items() if any(m in n for n in shown.values())]
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*marks, *report.notes))
    return (
        '<div class="wide"><table><caption>Metrics on the evaluated images, in percent</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div><ul>{notes}</ul>"
    )


# --- curves -------------------------------------------------------------------------------------------------


def _curves(report: Report) -> str:
    scores, figures = report.scores, []
    by_category: dict[str, list[int]] = {}
    for i, s in enumerate(scores.samples):
        if s.label >= 0:
            by_category.setdefault(s.category, []).append(i)
    for category, places in by_category.items():
        part, name = np.array(places), row_name(category)
        (what, value), labels = report.value, scores.labels[part]
        values = value[part]
        both = 0 < labels.sum() < len(labels)
        if both:
            fpr, tpr, _ = roc_curve(labels, values)
            found = report.results[name]["image_auroc"]
            text = f"{name}: ROC of images, area {100 * found:.2f} %"
            axes = ("false alarms among normal images", "found anomalous images")
            figures.append(_plot(text, few_points(fpr, tpr), axes, diagonal=True))
        points = scores.pro_curves.get(category)  # none where all masks are empty
        if both and points and scores.kind != "segmentation":
            text = f"{name}: PRO, area to 30 % {100 * report.results[name]['pro']:.2f} %"
            axes = ("false alarms among normal pixels", "mean covered share of a defect")
            figures.append(_plot(text, points, axes, limit=0.3))
        figures.append(_histogram(f"{name}: {what} of images", what, values, labels))
    return f'<div class="row">{"".join(figures)}</div>'


def _plot(
    text: str, curve: Curve, axes: tuple[str, str], *, limit: float = 1.0, diagonal: bool = False
) -> str:
    """A curve over [0, limit] x [0, 1] as an inline SVG figure."""
    points = " ".join(f"{_x(x / limit):.1f},{_y(y):.1f}" for x, y in curve)
    chance = f'<path class="chance" d="M{_x(0)} {_y(0)}L{_x(1)} {_y(1)}"/>' if diagonal else ""
    line = f'{chance}<polyline class="curve" points="{points}"/>'
    return _figure(text, axes, line, ends=("0", f"{limit:g}"))


def _histogram(text: str, what: str, values: np.ndarray, labels: np.ndarray) -> str:
    """Values of normal and anomalous images, in shares of their number; overlapping bars."""
    low, high = float(values.min()), float(values.max())
    edges = np.linspace(low, high + 1e-12 + 1e-6 * abs(high), 31)
    shares = [np.histogram(values[labels == k], edges)[0] / max(1, (labels == k).sum()) for k in (0, 1)]
    top = max(float(s.max()) for s in shares)
    bars = []
    for share, kind in zip(shares, ("normal", "anomalous"), strict=True):
        for i, value in enumerate(share):
            if value > 0:
                left, width = _x(i / 30), (WIDTH - 2 * MARGIN) / 30
                height = (HEIGHT - 2 * MARGIN) * value / top
                bars.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{_y(0) - height:.1f}" width="{width:.1f}" '
                    f'height="{height:.1f}"/>'
                )
    axes = (what, "share: blue normal, orange anomalous")
    return _figure(text, axes, "".join(bars), ends=(f"{low:.3g}", f"{high:.3g}"))


def _x(share: float) -> float:
    return MARGIN + share * (WIDTH - 2 * MARGIN)


def _y(share: float) -> float:
    return HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)


def _figure(text: str, axes: tuple[str, str], content: str, *, ends: tuple[str, str]) -> str:
    frame = f'<path class="frame" d="M{_x(0)} {_y(1)}V{_y(0)}H{_x(1)}"/>'
    ticks = (
        f'<text x="{_x(0)}" y="{HEIGHT - 22}">{ends[0]}</text>'
        f'<text x="{_x(1)}" y="{HEIGHT - 22}" text-anchor="end">{ends[1]}</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axes[0])}</text>'
        f'<text x="{MARGIN}" y="{MARGIN - 10}">{escape(axes[1])}</text>'
    )
    label = escape(text, quote=True)
    return (
        f'<figure><figcaption>{escape(text)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{frame}{content}{ticks}</svg></figure>'
    )


# --- pictures -----------------------------------------------------------------------------------------------


def _mistakes(report: Report) -> str:
    labels, (what, value) = report.scores.labels, report.value
    order = np.argsort(value)
    if what == "Dice":
        worst = _cards(report, order[:MISTAKES].tolist())
        return f"<h3>Images with the lowest Dice</h3>{worst}"
    missed = [int(i) for i in order if labels[i] == 1][:MISTAKES]
    alarms = [int(i) for i in order[::-1] if labels[i] == 0][:MISTAKES]
    if not missed or not alarms:
        return "<p>Only one kind of image was evaluated, so no ranking of mistakes exists.</p>"
    cards = [_cards(report, chosen) for chosen in (missed, alarms)]
    return (
        f"<h3>Anomalous images with the lowest scores</h3>{cards[0]}"
        f"<h3>Normal images with the highest scores</h3>{cards[1]}"
    )


def _gallery(report: Report) -> str:
    count = len(report.scores.samples)
    places = np.unique(np.linspace(0, count - 1, min(GALLERY, count)).round().astype(int))
    note = f"<p>{len(places)} of {count} images, evenly spread.</p>" if len(places) < count else ""
    buttons = (
        f'<p>Sort by <button type="button" data-sort="score" aria-pressed="false">{report.value[0]}</button> '
        '<button type="button" data-sort="defect" aria-pressed="false">kind</button> '
        '<button type="button" data-sort="place" aria-pressed="true">file order</button></p>'
    )
    return note + buttons + _cards(report, [int(i) for i in places], name="gallery")


def _cards(report: Report, chosen: Sequence[int], *, name: str = "") -> str:
    scores = report.scores
    scale = colour_scale(scores.maps, scores.labels)
    name_of_value, values = report.value
    cards = []
    for i in chosen:
        sample = scores.samples[i]
        mask = None if scores.masks is None else scores.masks[i]
        picture = _picture(report.pixels(i), scores.maps[i], mask, scale)
        about = f"{sample.category} {sample.defect} {sample.path.name}, {name_of_value} {values[i]:.4g}"
        what = {0: "normal", 1: sample.defect}.get(sample.label, "unknown")
        cards.append(
            f'<li data-score="{values[i]:.6g}" data-defect="{escape(what, quote=True)}" '
            f'data-place="{i}">'
            f'<img src="{picture}" alt="{escape(about, quote=True)}: image and heatmap" loading="lazy">'
            f"<span>{escape(what)}, {name_of_value} {values[i]:.4g}<br>{escape(sample.path.name)}</span></li>"
        )
    identity = f' id="{name}"' if name else ""
    return f'<ul class="cards"{identity}>{"".join(cards)}</ul>'


def _picture(
    image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray | None, scale: tuple[float, float]
) -> str:
    """Image with the mask's outline beside the map, as a JPEG data URL."""
    shown = image.copy()
    if mask is not None:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, contours, -1, (40, 220, 90), max(1, image.shape[0] // 160))
    both = np.hstack([shown, heatmap(anomaly_map, scale)])
    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(both.shape[1] * factor)), max(1, round(both.shape[0] * factor)))
    small = cv2.resize(both, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


# --- the rest -----------------------------------------------------------------------------------------------


def _settings(report: Report) -> str:
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.facts.items())
    text = escape(yaml.safe_dump(dict(report.settings), sort_keys=False))
    return f"<dl>{facts}</dl><details><summary>All settings</summary><pre>{text}</pre></details>"


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --line: #8a93a3;
  --ink: #1d2330; --paper: #fff; --one: #2a6fdb; --two: #d9631e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --paper: #14171d; --one: #7fb0ff; --two: #ff9d5c } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin-top: 2rem }
h3 { font-size: 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse } caption { text-align: left; padding: .3rem 0 }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child { text-align: left }
.row { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 300px; max-width: 26rem }
figcaption { font-weight: 600 } svg { width: 100%; height: auto }
svg text { font-size: 11px; fill: var(--ink) }
.frame { fill: none; stroke: var(--line) } .curve { fill: none; stroke: var(--one); stroke-width: 2 }
.chance { stroke: var(--line); stroke-dasharray: 4 4 } .normal { fill: var(--one); opacity: .7 }
.anomalous { fill: var(--two); opacity: .7 }
.cards { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .8rem }
.cards li { max-width: 20rem } .cards img { display: block; max-width: 100%; height: auto }
.cards span { font-size: .85rem; overflow-wrap: anywhere }
button { font: inherit; padding: .2rem .7rem } button[aria-pressed=true] { font-weight: 700 }
button:focus-visible, summary:focus-visible { outline: 3px solid var(--one) }
dt { font-weight: 600 } dd { margin: 0 0 .5rem; overflow-wrap: anywhere } pre { overflow-x: auto }
"""

SCRIPT = """
const gallery = document.getElementById('gallery');
const buttons = document.querySelectorAll('button[data-sort]');
for (const button of buttons) button.addEventListener('click', () => {
  const key = button.dataset.sort, cards = [...gallery.children];
  const number = (card, name) => Number(card.dataset[name]);
  const byScore = (a, b) => number(b, 'score') - number(a, 'score');
  const orders = {
    score: byScore,
    defect: (a, b) => a.dataset.defect.localeCompare(b.dataset.defect) || byScore(a, b),
    place: (a, b) => number(a, 'place') - number(b, 'place'),
  };
  cards.sort(orders[key]);
  gallery.append(...cards);
  for (const other of buttons) other.setAttribute('aria-pressed', String(other === button));
});
"""
