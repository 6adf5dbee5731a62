"""Sets with synthetic defects: for validation without test images, and to train on.

An image's defect depends on a seed, the image's place, and in training the epoch, on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datasets.loader import ImageSet
from datasets.samples import ANOMALOUS, NORMAL, Sample
from datasets.synthetic import DEFECT_KINDS, NoDefectError, add_defect
from datasets.transforms import Decode, Normalise


class SyntheticValidation(ImageSet):
    """Held-out training normals twice: as they are, and with a synthetic defect and its exact mask.

    kinds: of DEFECT_KINDS, drawn by chance. A defect is made when it is asked for. Pairs are kept in
    memory as far as the budget of the held-out set goes.
    """

    def __init__(self, held_out: ImageSet, *, seed: int, kinds: Sequence[str] = DEFECT_KINDS) -> None:
        normal = held_out.samples
        defective = [_with_defect(s) for s in normal]
        super().__init__([*normal, *defective], held_out.decode, held_out.normalise)
        self.held_out, self.has_masks, self.kind = held_out, True, held_out.kind
        self.seed, self.kinds = seed, kinds
        of_defect = self.image_bytes + self.image_bytes // 3  # with its mask
        self.kept = min(len(normal), held_out.budget // (self.image_bytes + of_defect))
        held_out.cached = min(held_out.cached, (held_out.budget - self.kept * of_defect) // self.image_bytes)
        self._defects: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.drawn(index)[0]

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1}."""
        return self.drawn(index)[1]

    def drawn(self, draw: int) -> tuple[np.ndarray, np.ndarray, int]:
        """As an ImageSet's."""
        place, n = draw % len(self), len(self.held_out)
        if place < n:
            return self.held_out.pixels(place), np.zeros(self.decode.size, np.uint8), NORMAL
        place -= n
        made = self._defects.get(place)
        if made is None:
            rng = np.random.default_rng([self.seed, place])
            made = _drawn_defect(self.held_out.pixels(place), rng, self.kinds)
            if place < self.kept:
                self._defects[place] = made
        return *made, ANOMALOUS


class SyntheticTraining(ImageSet):
    """Training images of which normal ones get a synthetic defect in a share of their draws, another each.

    Such a draw has the label of an anomaly and the defect's mask.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        decode: Decode,
        normalise: Normalise,
        *,
        cache_gb: float = 0,
        share: float,
        kinds: Sequence[str],
        seed: int,
    ) -> None:
        super().__init__(samples, decode, normalise, cache_gb=cache_gb)
        self.share, self.kinds, self.seed = share, kinds, seed
        self._places = {s.path: i for i, s in enumerate(self.samples)}

    def drawn(self, draw: int) -> tuple[np.ndarray, np.ndarray | None, int]:
        """As an ImageSet's."""
        image, mask, label = super().drawn(draw)
        epoch, index = divmod(draw, len(self))
        rng = np.random.default_rng([self.seed, epoch, index])
        if label == NORMAL and rng.random() < self.share:
            faster = self._faster(index, rng) if "speed" in self.kinds else None
            image, defect = _drawn_defect(image, rng, self.kinds, faster)
            mask, label = None if mask is None else defect, ANOMALOUS
        return image, mask, label

    def _faster(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """The frame with its earlier planes two to five times as far back, as far as the clip goes.

        At the start of a clip, where the other planes are later, the frame as it is.
        """
        if self._before(index) == index:
            return self.pixels(index)
        times, at, planes = int(rng.integers(2, 6)), index, [self.pixels(index)[..., 2]]
        for _ in range(2):
            for _ in range(times):
                at = self._before(at)
            planes.append(self.pixels(at)[..., 2])
        return np.stack(planes[::-1], axis=2)

    def _before(self, index: int) -> int:
        """The set's place of the frame one step earlier, its own where that is not there."""
        return min(index, self._places.get(self.samples[index].earlier[-1], index))


def _drawn_defect(
    image: np.ndarray, rng: np.random.Generator, kinds: Sequence[str], faster: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """A defect of a kind drawn by chance; where nothing moves, a kind that needs no motion stands in."""
    kind = kinds[rng.integers(len(kinds))]
    try:
        return add_defect(image, rng, kind=kind, texture=faster if kind == "speed" else None)
    except NoDefectError:
        still = [k for k in DEFECT_KINDS if k != kind]
        return add_defect(image, rng, kind=still[rng.integers(len(still))])


def _with_defect(sample: Sample) -> Sample:
    return Sample(sample.path, 1, None, sample.category, "validation", "synthetic", sample.group)
