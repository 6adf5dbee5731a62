"""The Dice score of UniAS (WACV 2025), to compare with its table: an oracle threshold for a whole class."""

from __future__ import annotations

import numpy as np

from evaluation.metrics import counts_by_score


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
    levels, hits, alarms = counts_by_score(maps, masks)
    total = hits / (hits + alarms) + hits / hits[-1]  # at a score of normal pixels alone it is smaller
    threshold = levels[::-1][np.argmax(total[::-1])]  # the lowest of equals
    dice = []
    for scores, mask in zip(maps, masks, strict=True):
        positive = scores >= threshold
        sums = np.count_nonzero(positive) + np.count_nonzero(mask)
        dice.append(2 * np.count_nonzero(positive & (mask > 0)) / sums if sums else 1.0)
    return float(np.mean(dice))
