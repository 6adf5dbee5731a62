"""Plots as SVG text: lines and points with axes, ticks and a legend; no drawing library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which people with any colour vision can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 300, 52, 12, 30, 42  # of a panel, pixels
LINE = 15  # height of a line of the legend


@dataclass(frozen=True)
class Series:
    """A curve, or points; `colour` counts through COLOURS, `dashed` is for curves. Unnamed: no legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    points: bool = False


@dataclass(frozen=True)
class Axis:
    """Label, limits and whether it is logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies between the limits, clipped to [0, 1]."""
        change = math.log10 if self.log else float
        low, high = change(self.low), change(self.high)
        lowest = self.low if self.log else -math.inf
        return min(1.0, max(0.0, (change(max(value, lowest)) - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Powers of ten, or about five round numbers."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**k for k in range(first, last + 1)]
        rough = (self.high - self.low) / 5
        unit = 10 ** math.floor(math.log10(rough))
        step = min((unit * k for k in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def panel(title: str, axes: tuple[Axis, Axis], series: Sequence[Series]) -> str:
    """The inside of one plot, WIDTH x HEIGHT, without the enclosing <svg>."""
    x_axis, y_axis = axes

    def at(x: float, y: float) -> str:
        return f"{_x(x_axis.place(x)):.1f},{_y(y_axis.place(y)):.1f}"

    drawn = []
    for s in series:
        colour = COLOURS[s.colour % len(COLOURS)]
        places = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        if s.points:
            drawn += [
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2.2" fill="{colour}" '
                'fill-opacity="0.6"/>'
                for p in places
            ]
        else:
            dash = ' stroke-dasharray="5 4"' if s.dashed else ""
            drawn.append(
                f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" '
                f'stroke-width="1.8"{dash}/>'
            )
    heading = f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>'
    return heading + _frame(x_axis, y_axis) + "".join(drawn)


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    lines, labels = [], []
    for tick in x_axis.ticks():
        x = _x(x_axis.place(tick))
        lines.append(f"M{x:.1f} {_y(0):.1f}V{_y(1):.1f}")
        labels.append(f'<text x="{x:.1f}" y="{_y(0) + 15:.1f}" text-anchor="middle">{tick:.6g}</text>')
    for tick in y_axis.ticks():
        y = _y(y_axis.place(tick))
        lines.append(f"M{_x(0):.1f} {y:.1f}H{_x(1):.1f}")
        labels.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    middle = (_y(0) + _y(1)) / 2
    return (
        f'<path d="{"".join(lines)}" stroke="#dddddd" fill="none"/>'
        f'<path d="M{_x(0)} {_y(1)}V{_y(0)}H{_x(1)}" stroke="#555555" fill="none"/>{"".join(labels)}'
        f'<text x="{(_x(0) + _x(1)) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_axis.label)}</text>'
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_axis.label)}'
        "</text>"
    )


def document(panels: Sequence[str], legend: Sequence[Series], *, columns: int = 3, about: str = "") -> str:
    """A whole SVG file: panels in rows of `columns`, one legend below. `about` is read out by screen readers.

    Series of the legend without a name, or with one that was there before, are left out.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    named = list({s.name: s for s in legend if s.name}.values())
    width = columns * WIDTH
    cell = 44 + 6 * max((len(s.name) for s in named), default=0)  # a letter is about 6 wide
    per_row = max(1, width // cell)
    height = rows * HEIGHT + LINE * -(-len(named) // per_row) + 12
    parts = [
        f'<g transform="translate({WIDTH * (i % columns)} {HEIGHT * (i // columns)})">{text}</g>'
        for i, text in enumerate(panels)
    ]
    for i, s in enumerate(named):
        x, y = 14 + cell * (i % per_row), rows * HEIGHT + LINE * (i // per_row) + 8
        colour = COLOURS[s.colour % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if s.dashed else ""
        mark = f'<path d="M{x} {y}h22" stroke="{colour}" stroke-width="2.5"{dash}/>'
        if s.points:
            mark = f'<circle cx="{x + 11}" cy="{y}" r="4" fill="{colour}"/>'
        parts.append(f'{mark}<text x="{x + 28}" y="{y + 4}">{escape(s.name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="#222222" role="img" '
        f'aria-label="{escape(about, quote=True)}"><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )
