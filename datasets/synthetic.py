"""Synthetic defects on a normal image, with exact masks: for training, and validation without test images.

alpha (H, W): opacity. target (H, W, 3): what a defect looks like where alpha is 1. Both float32. Lengths in
pixels are meant at 256 x 256 and grow with sqrt(H * W).
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from datasets.loader import Batch, Drawn, ImageSet
from datasets.samples import ANOMALOUS, NORMAL, Sample
from datasets.transforms import degraded

DEFECT_KINDS = ("texture", "scratch", "stain", "cut")
MOTION_KINDS = ("speed", "zoom")  # of frames with earlier frames as channels (`data.stack_frames`)
PLACE_KINDS = ("moved",)  # a large part in a wrong place; training alone draws it
MIN_SIDE, MIN_PIXELS = 32, 12  # of an image; of a mask
MIN_CHANGE = 5  # grey levels; less is not seen, so it is neither made nor masked
MIN_CONTRAST = 16  # the strongest tenth of a defect differs by this much on average, more on rough surfaces
MAX_AREA, MAX_MOVED = 0.08, 0.25  # of the image; the second of a moved part
_Pair = tuple[np.ndarray, np.ndarray]  # target and alpha, or image and mask


def add_defect(
    image: np.ndarray, rng: Generator, *, kind: str | None = None, texture: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Put one defect on a copy of a normal image; return the copy and its mask (H, W), uint8 in {0, 1}.

    Every masked pixel differs from the original by MIN_CHANGE or more in some channel; all others are kept.
    What is too small, too large or too faint is tried again, stronger each time: a mask has MIN_PIXELS pixels
    to MAX_AREA of the image, of a moved part to MAX_MOVED. Small is the usual case. Grey stays grey.

    image: (H, W, 3) uint8 RGB, sides of MIN_SIDE or more. kind: None for one of DEFECT_KINDS by chance.
    texture: (h, w, 3) uint8, another surface for the kind "texture"; None recolours and turns the image. For
    the kind "speed", the same frame with what moves moving faster (H, W, 3).
    Raises NoDefectError if none that is visible was found, as for "speed" where nothing moves.
    """
    for name, item in {"image": image, "texture": image if texture is None else texture}.items():
        if item.dtype != np.uint8 or item.shape[2:] != (3,) or min(item.shape[:2]) < MIN_SIDE:
            raise ValueError(f"{name}: {item.dtype} {item.shape}; give uint8 (H, W, 3), sides >= {MIN_SIDE}")
    kinds = (*DEFECT_KINDS, *MOTION_KINDS, *PLACE_KINDS)
    if kind is not None and kind not in kinds:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(kinds)}, or None")
    kind = kind or DEFECT_KINDS[rng.integers(len(DEFECT_KINDS))]
    make = (_texture, _scratch, _stain, _cut, _speed, _zoom, _moved)[kinds.index(kind)]
    scene = _look_at(image, image[..., ::-1] if texture is None else texture)
    if kind in MOTION_KINDS:
        # what moves is what the faster frame changes, or where the channels differ
        moving = abs(scene.texture - scene.image).max(2) if kind == "speed" else np.ptp(scene.image, axis=2)
        scene = scene._replace(deviation=moving, foreground=np.ones_like(scene.foreground))
    for attempt in range(60):
        spot = _pick_spot(scene, rng)
        target, alpha = make(scene, spot, rng, 1 + 0.2 * attempt)
        alpha = alpha * scene.foreground if rng.random() < 0.85 else alpha  # most end where the object ends
        (changed, mask), contrast = _composite(image, target, alpha)
        most = MAX_MOVED if kind in PLACE_KINDS else MAX_AREA
        is_sized = MIN_PIXELS <= np.count_nonzero(mask) <= most * mask.size
        if is_sized and contrast >= max(MIN_CONTRAST, min(0.7 * spot.roughness, 45)):
            return changed, mask
    raise NoDefectError(f"no visible {kind} in 60 attempts on a {image.shape} image")


class NoDefectError(RuntimeError):
    """No visible defect of that kind fits on the image."""


class _Scene(NamedTuple):
    image: np.ndarray  # (H, W, 3) float32
    texture: np.ndarray  # (h, w, 3) float32
    is_grey: bool
    deviation: np.ndarray  # (H, W) local standard deviation of the grey values
    foreground: np.ndarray  # (H, W) float32 in [0, 1]; all 1 where no background can be told
    scale: float  # pixels per pixel of a 256 x 256 image


class _Spot(NamedTuple):
    x: int
    y: int
    colour: np.ndarray  # (3,) mean around the spot
    roughness: float  # mean deviation around it


def _look_at(image: np.ndarray, texture: np.ndarray) -> _Scene:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    box = (max(5, min(grey.shape) // 32) | 1,) * 2
    deviation = np.sqrt(np.maximum(cv2.blur(grey * grey, box) - cv2.blur(grey, box) ** 2, 0))
    smooth = deviation <= 0.2 * np.percentile(deviation[::2, ::2], 98)
    _, label, stats, _ = cv2.connectedComponentsWithStats(smooth.astype(np.uint8))
    outer = np.unique(np.concatenate([label[0], label[-1], label[:, 0], label[:, -1]]))
    # background: large smooth regions at the border, widened by what the window took from them
    large = [i for i in outer if i and 0.15 < stats[i, cv2.CC_STAT_AREA] / grey.size < 0.95]
    foreground = 1 - np.minimum(3 * cv2.blur(np.float32(np.isin(label, large)), box), 1)
    is_grey = bool(np.ptp(image[::4, ::4], axis=2).mean() < 3)
    scale = grey.size**0.5 / 256
    return _Scene(np.float32(image), np.float32(texture), is_grey, deviation, foreground, scale)


def _pick_spot(scene: _Scene, rng: Generator) -> _Spot:
    """Likelier where the image has structure, never impossible elsewhere."""
    width, reach = scene.deviation.shape[1], max(4, round(8 * scene.scale))
    weight = cv2.blur(scene.deviation, (4 * reach, 4 * reach)) * scene.foreground
    total = np.cumsum(weight + (0.02 * weight.max() + 1e-3), dtype=float)
    y, x = divmod(int(np.searchsorted(total, rng.random() * total[-1])), width)
    near = np.s_[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
    return _Spot(x, y, scene.image[near].mean((0, 1)), float(scene.deviation[near].mean()))


def _tone(scene: _Scene, spot: _Spot, rng: Generator, strength: float, dark: float = 0.5) -> np.ndarray:
    """Change of colour (3,): darker with probability `dark` if there is room, tinted on colour images."""
    contrast = strength * (rng.uniform(18, 60) + rng.uniform(0.3, 1.0) * spot.roughness)
    room = {-1: float(spot.colour.mean()) - 8, 1: 247 - float(spot.colour.mean())}
    sign = -1 if rng.random() < dark else 1
    sign = sign if room[sign] > 25 else -sign
    tint = np.zeros(3) if scene.is_grey else rng.uniform(-0.5, 0.5, 3)
    return (min(contrast, room[sign], 110) * (sign + tint - tint.mean())).astype(np.float32)


def _blob(scene: _Scene, spot: _Spot, rng: Generator, low: float, high: float) -> np.ndarray:
    """Irregular shape (H, W) in [0, 1], `low` to `high` of the image: noise minus distance, cut at a rank."""
    area = max(low * (high / low) ** rng.random() * scene.deviation.size, 1.6 * MIN_PIXELS)
    axis = np.linspace(-3, 3, 64)  # in radii of a disc of that area
    noise = cv2.GaussianBlur(rng.standard_normal((64, 64)), (0, 0), rng.uniform(2.5, 6))
    field = noise * rng.uniform(0.2, 0.9) / noise.std() - 0.7 * (axis**2 + axis[:, None] ** 2)
    stretch, zoom = 1.6 ** rng.uniform(-1, 1), 6 * np.sqrt(area / np.pi) / 64
    matrix = cv2.getRotationMatrix2D((0, 0), rng.uniform(0, 360), zoom) @ np.diag([stretch, 1 / stretch, 1])
    matrix[:, 2] = (spot.x, spot.y) - matrix[:, :2] @ (31.5, 31.5)
    outside, size = float(field.min()), scene.deviation.shape[::-1]
    field = cv2.warpAffine(field.astype(np.float32), matrix, size, borderValue=outside)
    inside = np.sort(field[field > outside])
    shape = np.maximum(field - inside[-min(int(area), inside.size)], 0)
    return shape / shape.max()


def _move(scene: _Scene, spot: _Spot, source: np.ndarray, at: tuple, turn: float, zoom: float) -> np.ndarray:
    """Turn and zoom the source about the point `at` (x, y), and bring that point to the spot."""
    matrix = cv2.getRotationMatrix2D(at, turn, zoom)
    matrix[:, 2] += np.subtract((spot.x, spot.y), at)
    return cv2.warpAffine(source, matrix, scene.deviation.shape[::-1], borderMode=cv2.BORDER_REFLECT)


def _texture(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """A patch of another surface, its brightness moved part of the way to that of its surroundings."""
    middle = tuple(rng.uniform(0.2, 0.8, 2) * scene.texture.shape[1::-1])
    target = _move(scene, spot, scene.texture, middle, rng.uniform(30, 330), rng.uniform(0.7, 1.6))
    if scene.is_grey:
        target = cv2.cvtColor(cv2.cvtColor(target, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    shape = _blob(scene, spot, rng, 0.001, 0.075)
    shift = rng.uniform(0.4, 1) * (spot.colour - target[shape > 0].mean(0))
    target += shift + _tone(scene, spot, rng, strength) * rng.uniform(0.1, 0.8)
    return target, np.minimum(6 * shape, 1) * min(rng.uniform(0.4, 1.1) * strength**0.5, 1)


def _scratch(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """One to three nearly parallel, slightly bent lines, worn along their way."""
    fine = int(np.clip(4 / scene.scale, 1, 4))  # sub-pixels, averaged: an even width below two pixels
    canvas, size = np.zeros(np.multiply(scene.deviation.shape, fine), np.uint8), scene.deviation.shape[::-1]
    length, turn = 14 * 8 ** rng.random() * scene.scale, rng.uniform(0, 2 * np.pi)
    thickness = round(fine * max(rng.uniform(1, 2.6) * scene.scale, 1))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        bend = turn + rng.normal(0, 0.08) + np.cumsum(rng.normal(0, 0.05, 24))
        way = np.cumsum(np.stack([np.cos(bend), np.sin(bend)], 1), 0) * length * rng.uniform(0.6, 1) / 24
        way += rng.normal((spot.x, spot.y), 4 * scene.scale) - way.mean(0)
        cv2.polylines(canvas, [np.int32(np.rint(fine * way))], False, 255, thickness, cv2.LINE_AA)
    alpha = np.float32(cv2.resize(canvas, size, interpolation=cv2.INTER_AREA)) / 255
    wear = cv2.resize(np.float32(rng.uniform(0.5, 1.2, (8, 8))), size)
    change = rng.uniform(0.2, 0.7) * (spot.colour - scene.image) + _tone(scene, spot, rng, 1.2 * strength)
    return scene.image + change, alpha * np.minimum(wear, 1)


def _stain(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """A soft-edged spot, mostly darker, through which the surface shows."""
    edge = np.minimum(_blob(scene, spot, rng, 0.0012, 0.06) / rng.uniform(0.2, 0.9), 1)
    change = rng.uniform(0, 0.5) * (spot.colour - scene.image) + _tone(scene, spot, rng, strength, dark=0.8)
    return scene.image + change, edge * edge * (3 - 2 * edge)


def _cut(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """A slightly turned rectangle from elsewhere, as in CutPaste: of two places the more alike, retoned."""
    two = _pick_spot(scene, rng), _pick_spot(scene, rng)
    twin = min(two, key=lambda o: abs(o.colour - spot.colour).sum())
    turn, aspect = rng.uniform(-20, 20), 5 ** rng.uniform(-1, 1)
    target = _move(scene, spot, scene.image, (twin.x, twin.y), turn, 1)
    target += _tone(scene, spot, rng, strength) * rng.uniform(0, min(0.4 * strength, 1))
    area = max(0.001 * 40 ** rng.random() * scene.deviation.size, 1.6 * MIN_PIXELS)
    box = cv2.boxPoints(((spot.x, spot.y), (np.sqrt(area * aspect), np.sqrt(area / aspect)), -turn))
    return target, cv2.fillConvexPoly(np.zeros_like(scene.deviation), np.int32(np.rint(box)), 1.0)


def _speed(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """What moves at the spot moves faster: its earlier places lie farther back."""
    return scene.texture, np.minimum(6 * _blob(scene, spot, rng, 0.004, 0.03 * strength), 1)


def _zoom(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """What moves at the spot is larger, and so is its way."""
    at = (spot.x, spot.y)
    target = _move(scene, spot, scene.image, at, 0, rng.uniform(1.5, 2.2) * strength**0.5)
    return target, np.minimum(6 * _blob(scene, spot, rng, 0.01, 0.05), 1)


def _moved(scene: _Scene, spot: _Spot, rng: Generator, strength: float) -> _Pair:
    """A part of up to 0.6 of each side, brought up to 0.3 of each side away."""
    size = np.array(scene.deviation.shape[::-1])  # along x, y
    half, way, angle = rng.uniform(0.06, 0.3, 2), rng.uniform(0.04, 0.3), rng.uniform(0, 2 * np.pi)
    at = (spot.x, spot.y) + way * size * (np.cos(angle), np.sin(angle))
    target = _move(scene, spot, scene.image, tuple(at), 0, 1)
    low, high = (np.int32((spot.x, spot.y) + sign * half * size).tolist() for sign in (-1, 1))
    box = cv2.rectangle(np.zeros_like(scene.deviation), low, high, 1.0, cv2.FILLED)
    return target, cv2.GaussianBlur(box, (0, 0), 1.5 * scene.scale)


def _composite(image: np.ndarray, target: np.ndarray, alpha: np.ndarray) -> tuple[_Pair, float]:
    """Blend where alpha > 0 and settle what is masked; the contrast beside it is 0 for an empty mask."""
    result, mask = image.copy(), np.zeros(alpha.shape, np.uint8)
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    part = np.s_[y : y + max(height, 1), x : x + max(width, 1)]
    image, target, alpha = image[part], target[part], alpha[part]
    changed = np.clip(np.rint(image + alpha[..., None] * (target - image)), 0, 255).astype(np.uint8)
    seen, shape = cv2.absdiff(changed, image).max(2) >= MIN_CHANGE, alpha > 0.3 * alpha.max()
    # small holes are filled and specks dropped: every region counts once in region-wise metrics
    dense = cv2.blur(np.float32(seen & shape), (5, 5)) >= 0.5 * cv2.blur(np.float32(shape), (5, 5))
    _, label, stats, _ = cv2.connectedComponentsWithStats(np.uint8(dense & (alpha > 0) & (seen | shape)))
    sizes = np.append(0, stats[1:, cv2.CC_STAT_AREA])
    inside = (sizes >= max(4, 0.1 * sizes.max()))[label]
    if not inside.any():
        return (result, mask), 0.0
    faint = inside & ~seen
    changed[faint] = np.where(image[faint] > 127, image[faint] - MIN_CHANGE, image[faint] + MIN_CHANGE)
    result[part][inside], mask[part][inside] = changed[inside], 1
    # of local means, so a replaced texture counts only where it looks different
    change = cv2.blur(np.float32(result[part]) - image, (13, 13))[inside]
    change /= cv2.blur(np.float32(inside), (13, 13))[inside, None]
    return (result, mask), float(np.percentile(abs(change).max(1), 90))


class SyntheticValidation(ImageSet):
    """Held-out training normals twice: as they are, and with a synthetic defect and its exact mask.

    A defect depends on the seed and the image's place. It is kept as far as the held-out set's budget goes.
    """

    def __init__(self, held_out: ImageSet, *, seed: int, kinds: Sequence[str] = DEFECT_KINDS) -> None:
        normal = held_out.samples
        made = "validation", "synthetic"
        defective = [Sample(s.path, ANOMALOUS, None, s.category, *made, s.group) for s in normal]
        super().__init__([*normal, *defective], held_out.decode, held_out.normalise)
        self.held_out, self.has_masks, self.kind = held_out, True, held_out.kind
        self.seed, self.kinds = seed, kinds
        of_defect = self.image_bytes + self.image_bytes // 3  # with its mask
        self.kept = min(len(normal), held_out.budget // (self.image_bytes + of_defect))
        held_out.cached = min(held_out.cached, (held_out.budget - self.kept * of_defect) // self.image_bytes)
        self._defects: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.sample(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1}."""
        return self.sample(index)[1]

    def sample(self, draw: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Pixels, mask and label of a draw."""
        place, n = draw % len(self), len(self.held_out)
        if place < n:
            return self.held_out.pixels(place), np.zeros(self.decode.size, np.uint8), NORMAL
        place -= n
        made = self._defects.get(place)
        if made is None:
            image, rng = self.held_out.pixels(place), np.random.default_rng([self.seed, place])
            made = _draw(image, rng, self.kinds)
            if place < self.kept:
                self._defects[place] = made
        return *made, ANOMALOUS


class SyntheticTraining(ImageSet):
    """Training images of which normal ones get a synthetic defect in a share of their draws, another each.

    Such a draw has the label of an anomaly and the defect's mask. The defect depends on the seed, the epoch
    and the image's place. with_clean: a batch holds the images without it, too: clean (B, 3, H, W).
    degrades: all images are as of worse cameras, so that sharp edges do not tell what is drawn.
    """

    with_clean = degrades = False

    def __init__(self, images: ImageSet, *, share: float, kinds: Sequence[str], seed: int) -> None:
        super().__init__(images.samples, images.decode, images.normalise, cache_gb=images.budget / 2**30)
        self.share, self.kinds, self.seed = share, kinds, seed
        self._places = {s.path: i for i, s in enumerate(self.samples)}

    def sample(self, draw: int) -> Drawn:
        """Pixels, mask (None where masks are not known) and label of a draw."""
        return self._changed(draw, super().sample(draw))

    def _taken(self, draw: int, image: np.ndarray) -> np.ndarray:
        rng, frames = np.random.default_rng([self.seed, draw, 1]), bool(self.samples[0].earlier)
        return degraded(image, rng, frames=frames) if self.degrades else image

    def __getitems__(self, draws: list[int]) -> Batch:
        """The batch of these draws."""
        clean = list(map(super().sample, draws))
        batch = self.batch(draws, list(map(self._changed, draws, clean)))
        if self.with_clean:
            batch["clean"] = self.normalise(np.stack([*map(self._taken, draws, (s[0] for s in clean))]))
        return batch

    def _changed(self, draw: int, sample: Drawn) -> Drawn:
        image, mask, label = sample
        epoch, index = divmod(draw, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        if label == NORMAL and rng.random() < self.share:
            faster = self._faster(index, rng) if "speed" in self.kinds else None
            image, defect = _draw(image, rng, self.kinds, faster)
            mask, label = None if mask is None else defect, ANOMALOUS
        return self._taken(draw, image), mask, label

    def _faster(self, index: int, rng: Generator) -> np.ndarray:
        """The frame with its earlier channels two to five times as far back, as far as the clip goes.

        At the start of a clip, where the other channels are later, the frame as it is.
        """
        if self._before(index) == index:
            return self.pixels(index)
        times, at, frames = int(rng.integers(2, 6)), index, [self.pixels(index)[..., 2]]
        for _ in range(2):
            for _ in range(times):
                at = self._before(at)
            frames.append(self.pixels(at)[..., 2])
        return np.stack(frames[::-1], axis=2)

    def _before(self, index: int) -> int:
        """The set's place of the frame one step earlier, its own where that is not there."""
        return min(index, self._places.get(self.samples[index].earlier[-1], index))


def _draw(image: np.ndarray, rng: Generator, kinds: Sequence[str], faster: np.ndarray | None = None) -> _Pair:
    """A defect of a kind taken by chance; where nothing moves, a kind that needs no motion stands in."""
    kind = kinds[int(rng.integers(len(kinds)))]
    try:
        return add_defect(image, rng, kind=kind, texture=faster if kind == "speed" else None)
    except NoDefectError:
        still = [k for k in DEFECT_KINDS if k != kind]
        return add_defect(image, rng, kind=still[rng.integers(len(still))])
