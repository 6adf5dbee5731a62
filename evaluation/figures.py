"""Pictures: image, anomaly map and mask side by side on one colour scale; and the style of all plots."""

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.loader import ImageSet, evenly_spread
from evaluation.scoring import Scores
from utils.files import write_atomically

if TYPE_CHECKING:  # Matplotlib takes a second to import, so only what draws imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]
SEEN = 1 << 29  # pixels of maps; of more, a part makes the colour scale
# Okabe and Ito's colours, which people with any colour vision can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

STYLE: dict[Any, Any] = {  # by Matplotlib's names
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "uninet",  # the same names in each file
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


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
    colours = cv2.applyColorMap((255 * grey).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return np.asarray(colours[..., ::-1], np.uint8)


def outlined(image: np.ndarray, mask: np.ndarray | None) -> Picture:
    """A copy of the image (H, W, 3) with the mask's outline, if there is a mask (H, W)."""
    shown = image.copy()
    if mask is not None:
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, contours, -1, (40, 220, 90), max(1, image.shape[0] // 160))
    return shown


def overlay(image: np.ndarray, anomaly_map: np.ndarray, scale: tuple[float, float]) -> Picture:
    """Image, map, and the image under the map, side by side: (H, 3 W, 3)."""
    colours = heatmap(anomaly_map, scale)
    return np.hstack([image, colours, cv2.addWeighted(image, 0.5, colours, 0.5, 0)])


def choose_examples(scores: Scores, count: int) -> list[int]:
    """Indices of `count` images: one in four normal, the others over all kinds of defects, evenly spread."""
    kinds: dict[str, list[int]] = {}
    for i, s in enumerate(scores.samples):
        kinds.setdefault("" if s.label == 0 else s.defect, []).append(i)
    chosen = evenly_spread(kinds.pop("", []), max(1, count // 4))
    share = -(-(count - len(chosen)) // max(1, len(kinds)))
    spread = [evenly_spread(found, share) for found in kinds.values()]
    defects = [found[k] for k in range(share) for found in spread if k < len(found)]
    return sorted([*chosen, *defects[: count - len(chosen)]])


def heatmap_page(
    images: Sequence[np.ndarray], scores: Scores, chosen: Sequence[int], *, height: int = 128
) -> Picture:
    """The chosen images (each (H, W, 3) uint8) in a row: outlined, map and mask below each other, a caption.

    All maps are on one colour scale.
    """
    scale = colour_scale(scores.maps, scores.labels)
    columns = []
    for image, i in zip(images, chosen, strict=True):
        mask = np.zeros(image.shape[:2], np.uint8) if scores.masks is None else scores.masks[i]
        truth = np.repeat(255 * mask[..., None], 3, axis=2)
        stack = np.vstack([outlined(image, mask), heatmap(scores.maps[i], scale), truth])
        width = max(1, round(height * image.shape[1] / image.shape[0]))
        column = cv2.resize(stack, (width, 3 * height), interpolation=cv2.INTER_AREA)
        caption = np.full((30, width, 3), 255, np.uint8)
        for row, text in enumerate((scores.samples[i].defect[:20], f"score {scores.score[i]:.3g}")):
            write_on(caption, text, (3, 12 + 14 * row), 0.36)
        columns.append(np.pad(np.vstack([column, caption]), ((0, 0), (0, 4), (0, 0)), constant_values=255))
    return np.hstack(columns)


def example_page(data: ImageSet, scores: Scores, count: int) -> Picture:
    """`heatmap_page` of `count` images of a set, normal and anomalous."""
    chosen = choose_examples(scores, count)
    return heatmap_page([data.pixels(i) for i in chosen], scores, chosen)


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


def clip_page(scores: Scores) -> Picture:
    """Scores over the frames, one panel per clip, on one scale; anomalous frames are shaded."""
    groups = np.array([s.group for s in scores.samples])
    names = list(dict.fromkeys(groups.tolist()))
    limits = tuple(np.quantile(scores.score, [0.001, 0.999]))
    figure, panels = subplots(len(names), size=(3.2, 1.4))
    for axes, name in zip(panels, names, strict=True):
        values, labels = scores.score[groups == name], scores.labels[groups == name]
        frames, full = np.arange(len(values)), axes.get_xaxis_transform()
        axes.fill_between(frames, labels == 1, step="mid", color="#ffd6cc", linewidth=0, transform=full)
        axes.plot(values, linewidth=1)
        axes.set(title=f"{name}: {len(values)} frames", xlim=(-0.5, len(values) - 0.5), ylim=limits)
    return rgb(figure)


def subplots(
    count: int = 1, *, columns: int = 3, size: tuple[float, float] = (3.6, 2.8)
) -> "tuple[Figure, list[Axes]]":
    """A figure of `count` panels in rows of `columns`; `size` of a panel is in inches."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    matplotlib.rcParams.update(STYLE)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * size[0], rows * size[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[:count]:
        axes.locator_params(nbins=5)  # drawing takes its time per tick
    return figure, panels[:count]


def svg(figure: "Figure", title: str = "") -> str:
    """The figure as SVG, its text as text, the same for the same figure. Screen readers read `title` out."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Title": title, "Date": None})
    return file.getvalue().decode()


def rgb(figure: "Figure") -> Picture:
    """The figure as pixels (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
