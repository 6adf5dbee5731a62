"""Rendered parts for the demo: each image has its own pose, light, material and noise.

A scene is drawn twice from the same numbers, with its defect and without; the mask is where the two differ.

Legend: x, y (H, W): position on the part, in half sides of the image. height (H, W): in the same unit, up to
the viewer. All float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

MIN_CHANGE = 10  # grey levels; less is not seen, so it is not masked
MAT = np.array([0.17, 0.18, 0.20])  # colour of what lies below the parts


class View(NamedTuple):
    """Where the part lies and how it is lit. turn: of the part, light: to the lamp, both in radians."""

    x: np.ndarray
    y: np.ndarray
    pixel: float  # side of a pixel on the part
    turn: float
    light: float


class Surface(NamedTuple):
    """What a camera sees. colour: (H, W, 3) in [0, 1]. cover: (H, W) in [0, 1], 0 where the mat shows.

    shine: (H, W), strength of the highlights.
    """

    height: np.ndarray
    colour: np.ndarray
    cover: np.ndarray
    shine: np.ndarray


class Flaw(NamedTuple):
    """The defect, or good. It has its own source of chance, so the rest of the scene stays as it is."""

    kind: str
    rng: Generator


def render(
    category: str, seed: tuple[int, ...], size: int, kind: str = "good"
) -> tuple[np.ndarray, np.ndarray]:
    """An image (size, size, 3) uint8 and its mask (size, size) uint8 in {0, 1}, empty for a good part.

    The same arguments give the same image; images of one seed differ in the defect alone.
    """
    good = _photograph(category, seed, size, "good")
    if kind == "good":
        return good, np.zeros((size, size), np.uint8)
    image = _photograph(category, seed, size, kind)
    seen = np.uint8(cv2.absdiff(image, good).max(axis=2) >= MIN_CHANGE)
    box = np.ones((max(3, size // 40) | 1,) * 2, np.uint8)
    mask = cv2.morphologyEx(cv2.morphologyEx(seen, cv2.MORPH_CLOSE, box), cv2.MORPH_OPEN, box[:3, :3])
    image[mask == 0] = good[mask == 0]  # what is too faint for the mask is not there
    return image, mask


def _photograph(category: str, seed: tuple[int, ...], size: int, kind: str) -> np.ndarray:
    rng, flaw = np.random.default_rng(seed), Flaw(kind, np.random.default_rng((*seed, 1)))
    draw, most = SCENES[category].draw, SCENES[category].turn
    turn, light = rng.uniform(-most, most), rng.uniform(-2.7, -2.0)
    zoom, (left, top) = rng.uniform(0.96, 1.04), rng.uniform(-0.04, 0.04, 2)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    x, y = np.meshgrid((axis - left) * zoom, (axis - top) * zoom)
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    view = View(cos * x + sin * y, cos * y - sin * x, 2 * zoom / size, turn, light)
    mat = MAT * (1 + 0.25 * smooth_noise(rng, size, 4) + 0.10 * smooth_noise(rng, size, 90))[..., None]
    surface = draw(view, rng, flaw)
    image = _lit(surface, mat, view) * rng.uniform(0.92, 1.08)
    image = 255 * image + rng.normal(0, 2.5, (size, size, 1))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _lit(surface: Surface, mat: np.ndarray, view: View) -> np.ndarray:
    """Colours (H, W, 3) in about [0, 1]: diffuse light, highlights, and a soft shadow on the mat."""
    down, right = np.gradient(surface.height, view.pixel)
    up = 1 / np.sqrt(1 + down**2 + right**2)
    lamp = np.array([0.55 * np.cos(view.light), 0.55 * np.sin(view.light), 0.83])
    half = lamp + np.array([0, 0, 1])  # between the lamp and the viewer
    half /= np.linalg.norm(half)
    diffuse = np.clip((lamp[2] - lamp[0] * right - lamp[1] * down) * up, 0, None)
    highlight = np.clip((half[2] - half[0] * right - half[1] * down) * up, 0, None) ** 60
    lit = surface.colour * (0.25 + 0.85 * diffuse)[..., None] + (surface.shine * highlight)[..., None]
    along, across = (-0.05 * f(view.light) / view.pixel for f in (np.cos, np.sin))
    shift = np.array([[1, 0, along], [0, 1, across]], np.float32)
    shadow = cv2.warpAffine(surface.cover, shift, surface.cover.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.025 / view.pixel)
    cover = surface.cover[..., None]
    return cover * lit + (1 - cover) * mat * (1 - 0.6 * shadow[..., None])


# --- shapes -------------------------------------------------------------------------------------------------


def inside(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside a shape and 0 outside, from the distance to its border (negative inside), `width` wide."""
    level = np.clip(0.5 - distance / width, 0, 1)
    return (level * level * (3 - 2 * level)).astype(np.float32)


def smooth_noise(rng: Generator, size: int, grains: int) -> np.ndarray:
    """(size, size): noise with `grains` grains along a side, standard deviation about 1."""
    coarse = rng.standard_normal((grains + 3, grains + 3)).astype(np.float32)
    noise = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return noise / noise.std()


def blob(
    view: View, rng: Generator, at: tuple[float, float], radius: float, rough: float = 0.25
) -> np.ndarray:
    """Distance to the border of an irregular disc."""
    bumps = smooth_noise(rng, len(view.x), max(3, round(1.4 / radius)))
    return np.hypot(view.x - at[0], view.y - at[1]) - radius * (1 + rough * bumps)


def polar(radius: float, angle: float) -> tuple[float, float]:
    """A place (x, y)."""
    return radius * float(np.cos(angle)), radius * float(np.sin(angle))


# --- a turned steel flange with six holes -------------------------------------------------------------------


def flange(view: View, rng: Generator, flaw: Flaw) -> Surface:
    """Steel with the rings that a lathe leaves. Defects: chip, dent, plugged (a hole is missing), rust."""
    r, angle = np.hypot(view.x, view.y), np.arctan2(view.y, view.x)
    sector = np.mod(angle + np.pi / 6, np.pi / 3) - np.pi / 6
    which = np.floor(np.mod(angle + np.pi / 6, 2 * np.pi) / (np.pi / 3))
    bolt = np.hypot(r * np.cos(sector) - 0.58, r * np.sin(sector))  # distance to the nearest hole's centre
    if flaw.kind == "plugged":
        bolt = np.where(which == flaw.rng.integers(6), np.float32(1), bolt)
    rings = np.interp(r, np.linspace(0, 1.6, 200), rng.standard_normal(200)).astype(np.float32)
    height = 0.05 * inside(r - 0.38, 0.05) - 0.05 * inside(0.8 - r, 0.06) - 0.03 * inside(bolt - 0.1, 0.04)
    cover = inside(r - 0.84, view.pixel) * inside(0.2 - r, view.pixel) * inside(0.085 - bolt, view.pixel)
    # along a ring steel shines where the ring's tangent is at right angles to the light
    streak = np.abs(np.cos(angle + view.turn - view.light)) ** 8 * (1 + 0.3 * rings)
    tone = 0.50 + 0.035 * rings + 0.22 * streak + 0.02 * smooth_noise(rng, len(r), 6)
    colour = tone[..., None] * np.array([0.97, 1.0, 1.05], np.float32) * rng.uniform(0.92, 1.08)
    if flaw.kind == "chip":
        at = polar(flaw.rng.uniform(0.82, 0.88), flaw.rng.uniform(-np.pi, np.pi))
        gap = blob(view, flaw.rng, at, flaw.rng.uniform(0.09, 0.16))
        cover, height = cover * (1 - inside(gap, view.pixel)), height - 0.04 * inside(gap - 0.02, 0.05)
    if flaw.kind == "dent":
        at = polar(
            flaw.rng.uniform(0.46, 0.7),
            (flaw.rng.integers(6) + 0.5 + flaw.rng.uniform(-0.2, 0.2)) * np.pi / 3,
        )
        radius = flaw.rng.uniform(0.05, 0.09)
        near = np.hypot(view.x - at[0], view.y - at[1]) / radius
        height = height - 0.9 * radius * np.exp(-(near**2)) + 0.3 * radius * np.exp(-((near - 1.3) ** 2) * 8)
    if flaw.kind == "rust":
        at = polar(flaw.rng.uniform(0.3, 0.75), flaw.rng.uniform(-np.pi, np.pi))
        spot = inside(blob(view, flaw.rng, at, flaw.rng.uniform(0.08, 0.15), 0.45), 0.06)[..., None]
        grain = 1 + 0.2 * smooth_noise(flaw.rng, len(r), 60)[..., None]
        colour = colour + 0.85 * spot * (np.array([0.42, 0.22, 0.10], np.float32) * grain - colour)
    return Surface(height, colour, cover, np.full_like(r, 0.25))


# --- a blister pack of eight tablets ------------------------------------------------------------------------


def blister(view: View, rng: Generator, flaw: Flaw) -> Surface:
    """Tablets in embossed foil. Defects: missing, broken, mixed (another product's tablet), puncture."""
    x, y, kind = view.x, view.y, flaw.kind
    beyond = np.hypot(np.maximum(np.abs(x) - 0.76, 0), np.maximum(np.abs(y) - 0.48, 0)) - 0.1
    knurl = np.sin(70 * (x + y)) * np.sin(70 * (x - y))
    glint = 0.06 * knurl * (1 + 0.5 * smooth_noise(rng, len(x), 8))
    grey = 0.58 + glint + 0.05 * smooth_noise(rng, len(x), 5)
    colour = grey[..., None] * np.array([1, 0.99, 0.96], np.float32)
    height = 0.004 * knurl - 0.02 * inside(-beyond - 0.05, 0.03)
    # four by two pockets: each pixel belongs to the nearest
    column, row = np.clip(np.int32((x + 0.76) / 0.38), 0, 3), np.int32(y > 0)
    place, dx, dy = column + 4 * row, x + 0.57 - 0.38 * column, y + 0.24 - 0.48 * row
    pocket = np.hypot(dx, dy) - 0.165
    height = height + 0.03 * inside(np.abs(pocket) - 0.012, 0.02)
    colour = colour * (1 - 0.25 * inside(pocket, 0.02))[..., None]
    shift, way = np.float32(rng.uniform(-0.018, 0.018, (2, 8))), np.float32(rng.uniform(0, np.pi, 8))[place]
    dx, dy = dx - shift[0][place], dy - shift[1][place]
    edge = np.hypot(dx, dy) - 0.135
    odd = place == flaw.rng.integers(8)
    if kind == "broken":
        turn, rest = flaw.rng.uniform(0, 2 * np.pi), flaw.rng.uniform(-0.03, 0.05)
        crack = dx * np.cos(turn) + dy * np.sin(turn) + rest + 0.02 * smooth_noise(flaw.rng, len(x), 18)
        edge = np.where(odd, np.maximum(edge, crack), edge)
    if kind == "missing":
        edge = np.where(odd, np.float32(1), edge)
    body = inside(edge, view.pixel * 1.5)
    groove = inside(np.abs(dx * np.sin(way) - dy * np.cos(way)) - 0.008, 0.012)
    height = height * (1 - body) + 0.07 * inside(edge + 0.02, 0.06) - 0.02 * groove * body
    paint = np.array([0.86, 0.52, 0.42], np.float32) * (1 + 0.025 * smooth_noise(rng, len(x), 100)[..., None])
    if kind == "mixed":
        paint = np.where(odd[..., None], np.array([0.45, 0.62, 0.80], np.float32), paint)
    colour = colour + body[..., None] * (paint * rng.uniform(0.93, 1.05) - colour)
    if kind == "puncture":
        at = (flaw.rng.uniform(-0.7, 0.7), flaw.rng.uniform(-0.06, 0.06) + flaw.rng.choice([-0.48, 0, 0.48]))
        gap = blob(view, flaw.rng, at, flaw.rng.uniform(0.05, 0.09), 0.4)
        colour = colour * (1 - 0.8 * inside(gap, view.pixel * 2))[..., None]
        height = height + 0.05 * inside(np.abs(gap) - 0.015, 0.03)
    return Surface(height, colour, inside(beyond, view.pixel), np.full_like(x, 0.3))


class Scene(NamedTuple):
    """A category. turn: radians that a part may be turned to each side."""

    draw: Callable[[View, Generator, Flaw], Surface]
    kinds: tuple[str, ...]
    turn: float


SCENES = {
    "flange": Scene(flange, ("chip", "dent", "plugged", "rust"), np.pi),
    "blister": Scene(blister, ("missing", "broken", "mixed", "puncture"), 0.12),
}
