"""Pictures: image, anomaly map and mask side by side, on one colour scale for all."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.loader import ImageSet
from evaluation.scoring import Scores
from utils.files import write_atomically

Picture = NDArray[np.uint8]
SEEN = 1 << 29  # pixels of maps; of more, a part makes the colour scale


def colour_scale(maps: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Values shown as coldest and hottest colour: the median and the 99.9th percentile of all maps (N, H, W).

    One scale for all images, so that a normal image stays calm beside an anomalous one.
    """
    few = -(-maps.size // SEEN) | 1  # some images of a large set; every sixteenth pixel: no copy of all
    seen, labels = maps[::few, ::4, ::4].astype(np.float32), labels[::few]
    normal = seen[labels == 0]
    low = float(np.median(normal if len(normal) else seen))
    high = float(np.quantile(seen, 0.999))
    return low, max(high, low + 1e-6)


def heatmap(anomaly_map: np.ndarray, scale: tuple[float, float]) -> Picture:
    """(H, W) to colours (H, W, 3) RGB."""
    low, high = scale
    grey = np.clip((anomaly_map - low) / (high - low), 0, 1)
    return cv2.applyColorMap((255 * grey).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]


def overlay(image: np.ndarray, anomaly_map: np.ndarray, scale: tuple[float, float]) -> Picture:
    """Image, map, and the image under the map, side by side: (H, 3 W, 3)."""
    colours = heatmap(anomaly_map, scale)
    return np.hstack([image, colours, cv2.addWeighted(image, 0.5, colours, 0.5, 0)])


def triplet(
    image: np.ndarray, anomaly_map: np.ndarray, mask: np.ndarray | None, scale: tuple[float, float]
) -> Picture:
    """Image with the mask's outline, map, and mask, stacked: (3 H, W, 3)."""
    shown = image.copy()
    truth = np.zeros(image.shape[:2], np.uint8) if mask is None else mask.astype(np.uint8)
    contours, _ = cv2.findContours(truth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(shown, contours, -1, (40, 220, 90), max(1, image.shape[0] // 160))
    return np.vstack([shown, heatmap(anomaly_map, scale), np.repeat(255 * truth[..., None], 3, axis=2)])


def choose_examples(scores: Scores, count: int) -> list[int]:
    """Indices of `count` images: one in four normal, the others over all kinds of defects, evenly spread."""
    kinds: dict[str, list[int]] = {}
    for i, s in enumerate(scores.samples):
        kinds.setdefault("" if s.label == 0 else s.defect, []).append(i)
    chosen = _spread(kinds.pop("", []), max(1, count // 4))
    share = -(-(count - len(chosen)) // max(1, len(kinds)))
    spread = [_spread(found, share) for found in kinds.values()]
    defects = [found[k] for k in range(share) for found in spread if k < len(found)]
    return sorted([*chosen, *defects[: count - len(chosen)]])


def _spread(indices: list[int], count: int) -> list[int]:
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[i] for i in places]


def heatmap_page(
    images: Sequence[np.ndarray], scores: Scores, chosen: Sequence[int], *, height: int = 128
) -> Picture:
    """A row of triplets of the chosen images (each (H, W, 3) uint8), on one colour scale, captions below."""
    scale = colour_scale(scores.maps, scores.labels)
    columns = []
    for image, i in zip(images, chosen, strict=True):
        mask = None if scores.masks is None else scores.masks[i]
        column = triplet(image, scores.maps[i], mask, scale)
        width = max(1, round(height * image.shape[1] / image.shape[0]))
        column = cv2.resize(column, (width, 3 * height), interpolation=cv2.INTER_AREA)
        caption = np.full((30, width, 3), 255, np.uint8)
        for row, text in enumerate((scores.samples[i].defect[:20], f"score {scores.score[i]:.3g}")):
            write_on(caption, text, (3, 12 + 14 * row), 0.36)
        columns.append(np.pad(np.vstack([column, caption]), ((0, 0), (0, 4), (0, 0)), constant_values=255))
    return np.hstack(columns)


def example_page(data: ImageSet, scores: Scores, count: int) -> Picture:
    """`heatmap_page` of `count` images of a set, normal and anomalous."""
    chosen = choose_examples(scores, count)
    return heatmap_page([data.pixels(i) for i in chosen], scores, chosen)


def clip_page(scores: Scores, *, columns: int = 3, width: int = 320, height: int = 110) -> Picture:
    """Score over the frames of each clip, a panel each, on one scale; anomalous frames are shaded."""
    low, high = np.quantile(scores.score, [0.001, 0.999])
    names = list(dict.fromkeys(s.group for s in scores.samples))
    groups = np.array([s.group for s in scores.samples])
    panels = []
    for name in names:
        part = groups == name
        panels.append(
            _curve_panel(name, scores.score[part], scores.labels[part], (low, high), (width, height))
        )
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    return np.vstack([np.hstack(panels[i : i + columns]) for i in range(0, len(panels), columns)])


def _curve_panel(
    title: str, values: np.ndarray, labels: np.ndarray, scale: tuple[float, float], size: tuple[int, int]
) -> Picture:
    (width, height), (low, high), top = size, scale, 18
    panel = np.full((height, width, 3), 255, np.uint8)
    x = np.linspace(4, width - 5, len(values)).round().astype(int)
    for start, end, label in zip(x, [*x[1:], x[-1]], labels, strict=True):
        if label == 1:
            panel[top : height - 4, start : end + 1] = (255, 214, 204)
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    y = (height - 5 - share * (height - top - 6)).round().astype(int)
    cv2.polylines(
        panel, [np.stack([x, y], axis=1)[:, None]], isClosed=False, color=(30, 60, 140), lineType=cv2.LINE_AA
    )
    cv2.rectangle(panel, (3, top), (width - 4, height - 4), (170, 170, 170))
    write_on(panel, f"{title}: {len(values)} frames", (4, 13), 0.4)
    return panel


def write_on(picture: Picture, text: str, place: tuple[int, int], size: float) -> None:
    """Draw a line of text, its lower left corner at `place` (x, y).

    OpenCV's font is ASCII, and bytes of a file name that are no text crash it: accents are dropped, what else
    it lacks becomes a question mark.
    """
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = "".join(c if " " <= c <= "~" else "?" for c in letters)
    cv2.putText(picture, plain, place, cv2.FONT_HERSHEY_SIMPLEX, size, (30, 30, 30), 1, cv2.LINE_AA)


def write_png(path: Path, picture: Picture) -> None:
    """Write a picture, (H, W, 3) RGB or (H, W), in one step."""
    ok, encoded = cv2.imencode(".png", picture if picture.ndim == 2 else picture[..., ::-1])
    assert ok
    write_atomically(path, lambda file: file.write(encoded.tobytes()), flush=False)


def write_map(path: Path, anomaly_map: np.ndarray) -> None:
    """Write a map (H, W) as 32-bit float TIFF in one step."""
    image = Image.fromarray(anomaly_map.astype(np.float32))
    write_atomically(path, lambda file: image.save(file, format="TIFF"), flush=False)
