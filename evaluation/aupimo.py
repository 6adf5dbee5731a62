"""AUPIMO: recall of each anomalous image at very few false positives on normal images (arXiv 2401.01984).

With few normal images few pixels decide: 20 images of 256 x 256 have 13 pixels above 1e-5 and 131 above 1e-4,
which one bright speck can fill.
"""

import math
from collections.abc import Sequence

import numpy as np

LIMITS = (1e-5, 1e-4)  # false positive rates between which the recall is averaged, on a logarithmic axis


def aupimo(
    maps: np.ndarray, masks: np.ndarray, labels: np.ndarray, *, limits: tuple[float, float] = LIMITS
) -> float | None:
    """Mean over anomalous images of the normalised area under recall against false positive rate.

    The rate is the share of the M pixels of all normal images that lie above the threshold. The recall is the
    share of one anomalous image's anomalous pixels above it. At a rate x the threshold is the lowest one with
    at most a share x of false positives, so both are exact steps: between k / M and (k + 1) / M it is the
    (k + 1)-th largest score of all normal pixels. The area over log x is divided by the width: 1 is perfect.
    Raises ValueError for unequal shapes, or limits that do not increase within (0, 1).

    Args:
        maps: (N, H, W) finite, higher is more anomalous; normal and anomalous images.
        masks: (N, H, W) of {0, 1}; an anomalous image without an anomalous pixel is left out.
        labels: (N,) 0 normal, 1 anomalous.
        limits: lowest and highest false positive rate, in (0, 1).

    Returns:
        A fraction; None without a normal or without an anomalous image.
    """
    low, high = limits
    if not 0 < low < high < 1:
        raise ValueError(f"limits {limits} must increase within (0, 1)")
    if maps.shape != masks.shape or maps.ndim != 3 or len(labels) != len(maps):
        raise ValueError(f"maps {maps.shape}, masks {masks.shape}, {len(labels)} labels do not fit together")
    normal = [maps[i] for i in np.flatnonzero(labels == 0)]
    anomalous = [maps[i][masks[i] > 0] for i in np.flatnonzero(labels == 1) if masks[i].any()]
    if not (normal and anomalous):
        return None
    thresholds, widths = _steps(normal, low, high)
    areas = []
    for scores in anomalous:
        not_above = np.searchsorted(np.sort(scores), thresholds, side="right")
        areas.append(float((1 - not_above / scores.size) @ widths))
    return min(1.0, float(np.mean(areas)) / math.log(high / low))  # rounding may give more


def _steps(normal: Sequence[np.ndarray], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds between the limits, and how wide the step of each is on the logarithmic axis.

    Only the largest scores of the maps are held: as many as the highest rate needs.
    """
    size = len(normal) * normal[0].size
    first, last = math.floor(low * size), min(math.ceil(high * size), size)
    top = np.empty(0, normal[0].dtype)
    for scores in normal:
        top = np.concatenate([top, scores.reshape(-1)])
        top = np.partition(top, max(0, top.size - last))[-last:]
    top = np.sort(top)[::-1]
    rates = np.arange(first, last + 1) / size
    edges = np.log(np.clip(rates, low, high))
    return top[first:last], np.diff(edges)
