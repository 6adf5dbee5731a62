"""Decisions without labelled anomalies: p-values of new images from the scores of held-out normal ones."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out normal training images, and the map values shown as coldest and hottest colour."""

    scores: tuple[float, ...]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not np.isfinite([*self.scores, self.low, self.high]).all():
            raise FloatingPointError(
                "scores or maps of the held-out normals are not finite; train again with a lower optim.lr or "
                "--precision fp32"
            )

    def p_values(self, scores: np.ndarray) -> np.ndarray:
        """Share of normals at least as anomalous, each new image (N,) counted with them: (N,) in (0, 1].

        If a new image is normal and exchangeable with the held-out ones (same process, same camera, no
        drift), its p-value is at most r with probability at most r, whatever the model. It says nothing about
        how many anomalies are found.
        """
        held_out = np.sort(np.asarray(self.scores))
        above = len(held_out) - np.searchsorted(held_out, scores, side="left")
        return (1 + above) / (1 + len(held_out))

    @property
    def pixel_level(self) -> float:
        """Map value above which a pixel is marked: one in a thousand pixels of the held-out normals is.

        Middle of the colour scale; unlike the p-values of whole images no guarantee.
        """
        return (self.low + self.high) / 2

    def smallest_rate(self) -> float:
        """The smallest false-alarm rate that these normals can guarantee, 1 / (n + 1)."""
        return 1 / (1 + len(self.scores))
