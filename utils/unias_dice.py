"""The Dice score of UniAS (WACV 2025), to compare with its table: an oracle threshold for a whole class."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import precision_recall_curve


def unias_dice(maps: np.ndarray, masks: np.ndarray) -> float | None:
    """Mean over all test images of the Dice of map and mask, at one threshold for all of them.

    The threshold is the one with the largest sum of precision and recall over all pixels; the test masks
    choose it. A pixel at or above it is positive. An image without anomalous pixels counts 1 if nothing is
    predicted, else 0.

    Args:
        maps: (N, H, W) finite, higher is more anomalous.
        masks: (N, H, W) of {0, 1}.

    Returns:
        A fraction; None without an anomalous pixel.

    Raises:
        ValueError: unequal shapes.
    """
    if maps.shape != masks.shape or maps.ndim != 3:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} must have one shape (N, H, W)")
    if not masks.any():
        return None
    precision, recall, thresholds = precision_recall_curve(masks.reshape(-1), maps.reshape(-1))
    positive = maps >= thresholds[np.argmax((precision + recall)[:-1])]  # the last point has no threshold
    both = (positive & (masks > 0)).sum((1, 2))
    sums = positive.sum((1, 2)) + (masks > 0).sum((1, 2))
    return float(np.mean(np.where(sums == 0, 1, 2 * both / np.maximum(sums, 1))))
