"""Metrics that not every task has: frames of video, segmentation, the Dice score of UniAS, AUPIMO."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import roc_auc_score

from evaluation.metrics import Results, check_binary, check_finite, counts_by_score

AUPIMO_LIMITS = (1e-5, 1e-4)  # false positive rates between which the recall is averaged, on a log axis
CLIP_SIGMA = 4.0  # frames, of the Gaussian in the smoothed AUROCs


def frame_metrics(
    scores: np.ndarray, labels: np.ndarray, clips: Sequence[str], *, sigma: float = CLIP_SIGMA
) -> Results:
    """Frame AUROC: micro (all frames in one list) and macro (mean over clips that have both classes).

    The `_smoothed` ones take scores after a Gaussian (`sigma` in frames) along each clip, which looks at
    later frames. Scores are not rescaled by clip. A metric is None where a class is absent.
    scores, labels: (N,), frames of a clip in order. clips: the clip of each frame.
    """
    names, raw = np.asarray(clips), np.asarray(scores, dtype=np.float64)
    parts = [np.flatnonzero(names == name) for name in dict.fromkeys(clips)]
    smoothed = raw.copy()
    for part in parts if sigma > 0 else ():
        smoothed[part] = gaussian_filter1d(raw[part], sigma)
    results: Results = {}
    for suffix, values in (("", raw), ("_smoothed", smoothed)):
        mixed = 0 < labels.sum() < len(labels)
        both = [part for part in parts if 0 < labels[part].sum() < len(part)]
        macro = [float(roc_auc_score(labels[part], values[part])) for part in both]
        results[f"frame_auroc_micro{suffix}"] = float(roc_auc_score(labels, values)) if mixed else None
        results[f"frame_auroc_macro{suffix}"] = fmean(macro) if macro else None
    return results


def segmentation_metrics(probability: np.ndarray, masks: np.ndarray, *, soft: bool = False) -> Results:
    """DSC (Dice) and mIoU (intersection over union) of the foreground, in [0, 1], averaged over images.

    probability: (N, H, W) in [0, 1]; above 0.5 is foreground. masks: (N, H, W) of {0, 1}.
    soft: as in the public code, each image's probabilities stretched to [0, 1], no threshold, smoothing 1.
    Raises ValueError for empty input, unequal shapes, probabilities outside [0, 1], masks not of 0 and 1.
    """
    p = check_finite(np.asarray(probability, np.float64), "probability")
    g = check_binary(np.asarray(masks), "masks")
    if p.shape != g.shape or p.ndim != 3 or p.min() < 0 or p.max() > 1:
        raise ValueError(f"probability {p.shape} in [0, 1] and masks {g.shape} must have one shape (N, H, W)")
    if soft:
        p = p - p.min((1, 2), keepdims=True)
        p /= np.maximum(p.max((1, 2), keepdims=True), np.finfo(np.float64).tiny)
    else:
        p = (p > 0.5).astype(np.float64)
    both, sums = (p * g).sum((1, 2)), p.sum((1, 2)) + g.sum((1, 2))
    smooth = np.where(sums == 0, 1.0, float(soft))  # an empty mask that is predicted empty counts 1
    dice = (2 * both + smooth) / (sums + smooth)
    iou = (both + smooth) / (sums - both + smooth)
    return {"dsc": float(dice.mean()), "miou": float(iou.mean())}


def unias_dice(maps: np.ndarray, masks: np.ndarray) -> float | None:
    """The Dice score of UniAS (WACV 2025): mean over all test images, at one oracle threshold for all.

    The threshold has the largest sum of precision and recall over all pixels; the test masks choose it. An
    image without anomalous pixels counts 1 if nothing is predicted, else 0. None without an anomalous pixel.
    maps: (N, H, W) finite, higher is more anomalous; masks: of {0, 1}; ValueError for other shapes.
    """
    if maps.shape != masks.shape or maps.ndim != 3:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} must have one shape (N, H, W)")
    if not masks.any():
        return None
    levels, tp, fp = counts_by_score(maps, masks)
    total = tp / (tp + fp) + tp / tp[-1]  # smaller at a score that only normal pixels have
    threshold = levels[::-1][np.argmax(total[::-1])]  # the lowest of equals
    dice = []
    for scores, mask in zip(maps, masks, strict=True):
        positive = scores >= threshold
        sums = np.count_nonzero(positive) + np.count_nonzero(mask)
        dice.append(2 * np.count_nonzero(positive & (mask > 0)) / sums if sums else 1.0)
    return float(np.mean(dice))


def aupimo(
    maps: np.ndarray, masks: np.ndarray, labels: np.ndarray, *, limits: tuple[float, float] = AUPIMO_LIMITS
) -> float | None:
    """AUPIMO (arXiv 2401.01984): recall of each anomalous image at very few false positives on normal ones.

    The false positive rate is that of all M pixels of normal images, the recall that of one image's anomalous
    pixels. At a rate x the threshold is the lowest one with at most a share x of false positives, so both are
    exact steps: from k / M on it is the (k + 1)-th largest score of all normal pixels. The area over log x
    between the limits is divided by the width, 1 is perfect; the mean over anomalous images is returned, None
    without a normal or an anomalous one. With few normal images few pixels decide: 20 of 256 x 256 have 13
    above 1e-5, which one bright speck can fill.
    maps: (N, H, W) finite. masks: (N, H, W) of {0, 1}. labels: (N,). Raises ValueError for unequal shapes,
    and for limits that do not increase within (0, 1).
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
    thresholds, widths = _aupimo_steps(normal, low, high)
    areas = []
    for scores in anomalous:
        not_above = np.searchsorted(np.sort(scores), thresholds, side="right")
        areas.append(float((1 - not_above / scores.size) @ widths))
    return min(1.0, float(np.mean(areas)) / math.log(high / low))  # rounding may give more


def _aupimo_steps(normal: Sequence[np.ndarray], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds between the limits, and the width of each step in log x. Holds only the largest scores."""
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
