"""How a training step grows with image size and batch: a table and an SVG plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol import Spec, WorkerError
from rows import Setup, measure
from tables import cell, markdown

SIZES, BATCHES = (256, 384, 512), (1, 4, 8, 16)
COLOURS = ("#0072b2", "#d55e00", "#009e73")
WIDTH, HEIGHT, MARGIN = 360, 260, 50


@dataclass(frozen=True)
class Point:
    """One measured step; seconds and gb are None where it did not fit."""

    size: int
    batch: int
    seconds: float | None
    gb: float | None


def grow(setup: Setup, variant: str, precision: str) -> Iterator[Point]:
    """Each size and batch in a process of its own, the small ones first; what would not fit is left out."""
    for size in SIZES:
        last: Point | None = None
        for batch in BATCHES:
            grows = last is not None and last.gb is not None and last.gb * batch / last.batch
            if setup.device == "cpu" and grows and grows > available_gb():
                last = Point(size, batch, None, None)
            else:
                last = step(setup, Spec("train", variant, precision, batch=batch, size=size))
            yield last


def step(setup: Setup, spec: Spec) -> Point:
    """One point, empty if the process died (for want of memory, as a rule)."""
    try:
        found = measure(setup, spec, peer=False, limited=False)
    except WorkerError:
        return Point(spec.size, spec.batch, None, None)
    return Point(spec.size, spec.batch, found.seconds("ours"), found.largest("ours", "peak_gb"))


def available_gb() -> float:
    """Free memory of the machine, Linux; infinite elsewhere."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return float("inf")
    entry = next(x for x in path.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(entry.split()[1]) / 2**20


def table(points: list[Point]) -> str:
    """A row a size and batch."""
    rows = [["size", "batch", "step, s", "s per image", "peak, GB"]]
    for p in points:
        each = None if p.seconds is None else p.seconds / p.batch
        rows.append([str(p.size), str(p.batch), cell(p.seconds, ".3g"), cell(each, ".3g"), cell(p.gb, ".2f")])
    return markdown(rows)


def plot(points: list[Point]) -> str:
    """Two panels over the batch, one line per size: seconds of a step, and peak memory."""
    panels = [("step, s", lambda p: p.seconds), ("peak memory, GB", lambda p: p.gb)]
    parts = [_panel(points, title, value, MARGIN + i * WIDTH) for i, (title, value) in enumerate(panels)]
    size = f'width="{2 * WIDTH + MARGIN}" height="{HEIGHT + 2 * MARGIN}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _panel(points: list[Point], title: str, value: object, left: int) -> str:
    shown = [p for p in points if value(p) is not None]
    top = max((value(p) for p in shown), default=1.0)
    right, bottom = WIDTH - MARGIN - 30, MARGIN + HEIGHT

    def place(batch: int, height: float) -> str:
        return f"{left + right * batch / max(BATCHES):.1f},{bottom - HEIGHT * height / top:.1f}"

    lines = [f'<text x="{left}" y="{MARGIN - 14}">{title}</text>']
    lines.append(f'<path d="M{left},{MARGIN} V{bottom} H{left + right}" fill="none" stroke="#555"/>')
    for tick in range(5):
        x, y = place(0, top * tick / 4).split(",")
        lines.append(f'<text x="{float(x) - 6}" y="{y}" text-anchor="end">{top * tick / 4:.3g}</text>')
    for batch in BATCHES:
        x, _ = place(batch, 0).split(",")
        lines.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{batch}</text>')
    lines.append(f'<text x="{left + right / 2}" y="{bottom + 34}" text-anchor="middle">batch</text>')
    for size, colour in zip(SIZES, COLOURS, strict=True):
        own = [p for p in shown if p.size == size]
        if own:
            way = " ".join(place(p.batch, value(p)) for p in own)
            lines.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
            x, y = place(own[-1].batch, value(own[-1])).split(",")
            lines.append(f'<text x="{x}" y="{y}" fill="{colour}">{size}</text>')
    return "\n".join(lines)
