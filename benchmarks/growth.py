"""How a training step grows with image size and batch: a table and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from protocol import Spec, WorkerError
from rows import Setup, measure
from tables import cell, markdown

from evaluation.figures import subplots, svg

SIZES, BATCHES = (256, 384, 512), (1, 4, 8, 16)


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
    """One row per size and batch."""
    rows = [["size", "batch", "step, s", "s per image", "peak, GB"]]
    for p in points:
        each = None if p.seconds is None else p.seconds / p.batch
        rows.append([str(p.size), str(p.batch), cell(p.seconds, ".3g"), cell(each, ".3g"), cell(p.gb, ".2f")])
    return markdown(rows)


def plot(points: list[Point]) -> str:
    """Two panels over the batch, one line per size: seconds of a step, and peak memory, as SVG."""
    figure, panels = subplots(2)
    quantities = (("step, s", "seconds"), ("peak memory, GB", "gb"))
    for axes, (label, name) in zip(panels, quantities, strict=True):
        for size in SIZES:
            shown = [p for p in points if p.size == size and getattr(p, name) is not None]
            values = [getattr(p, name) for p in shown]
            axes.plot([p.batch for p in shown], values, marker=".", label=f"{size} px")
        axes.set(xlabel="batch", ylabel=label, xticks=BATCHES, xlim=(0, None), ylim=(0, None))
        axes.legend()
    return svg(figure, "step time and peak memory by batch and image size")
