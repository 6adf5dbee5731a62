"""Calibration: scores and a fixed colour scale from held-out normals."""

from __future__ import annotations

import numpy as np

from evaluation.scoring import Scores
from model.calibration import Calibration


def calibrate(held_out: Scores) -> Calibration:
    """Take scores and colour scale from held-out normals.

    The scale begins at the median of their maps and ends at twice the distance to their 99.9th percentile, so
    that normal images use its lower half.
    """
    low = float(np.median(held_out.maps))
    high = float(np.quantile(held_out.maps, 0.999))
    return Calibration(tuple(map(float, held_out.score)), low, low + 2 * max(high - low, 1e-6))
