"""AUPIMO: recall of each anomalous image at very few false alarms on normal images (arXiv 2401.01984).

With few normal images few pixels decide: 20 images of 256 x 256 have 13 pixels above 1e-5 and 131 above 1e-4,
which one bright speck can fill.

Legend: N normal images, H x W pixels, M = N H W pixels of normal images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LIMITS = (1e-5, 1e-4)  # false positive rates between which the recall is averaged, on a logarithmic axis


def aupimo(
    maps: np.ndarray, masks: np.ndarray, labels: np.ndarray, *, limits: tuple[float, float] = LIMITS
) -> float | None:
    """Mean over anomalous images of the normalised area under recall against false positive rate.

    The rate is the mean over the normal images alone of their share of pixels above the threshold; all have
    the same size, so that is the share of their M pixels together. Recall is of one anomalous image: the
    share of its anomalous pixels above the threshold. At a rate x the threshold is the lowest one with at
    most a share x of false alarms, so both are exact steps: between k / M and (k + 1) / M the (k + 1)-th
    largest score of all normal pixels. The area over log x is divided by the width, so 1 is perfect.

    Args:
        maps: (N', H, W) finite, higher is more anomalous; normal and anomalous images.
        masks: (N', H, W) of {0, 1}; an anomalous image without an anomalous pixel is left out.
        labels: (N',) 0 normal, 1 anomalous.
        limits: lowest and highest false positive rate, in (0, 1).

    Returns:
        A fraction; None without a normal or without an anomalous image.

    Raises:
        ValueError: unequal shapes, or limits that do not increase within (0, 1).
    """
    low, high = limits
    if not 0 < low < high < 1:
        raise ValueError(f"limits {limits} must increase within (0, 1)")
    if maps.shape != masks.shape or maps.ndim != 3 or len(labels) != len(maps):
        raise ValueError(f"maps {maps.shape}, masks {masks.shape}, {len(labels)} labels do not fit together")
    normal = np.flatnonzero(labels == 0)
    anomalous = [(maps[i], masks[i]) for i in np.flatnonzero(labels == 1) if masks[i].any()]
    if not (normal.size and anomalous):
        return None
    thresholds, widths = _steps([maps[i] for i in normal], low, high)
    areas = []
    for scores, mask in anomalous:
        found = np.sort(scores[mask > 0])
        recall = 1 - np.searchsorted(found, thresholds, side="right") / found.size  # strictly above
        areas.append(float(recall @ widths))
    return min(1.0, float(np.mean(areas)) / math.log(high / low))  # no more by rounding


def _steps(normal: Sequence[np.ndarray], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds between the limits, and how wide the step of each is on the logarithmic axis.

    Of the maps of normal images only the largest scores are held, a ten-thousandth of all.
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
