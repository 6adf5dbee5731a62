"""Metrics of one task each: frames of video, segmentation, and the Dice score of UniAS."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import roc_auc_score

from evaluation.metrics import Results, check_binary, check_finite, counts_by_score

CLIP_SIGMA = 4.0  # frames, of the Gaussian in the smoothed AUROCs


def frame_metrics(
    scores: np.ndarray, labels: np.ndarray, clips: Sequence[str], *, sigma: float = CLIP_SIGMA
) -> Results:
    """Frame AUROC: micro (all frames in one list) and macro (mean over clips that have both classes).

    The `_smoothed` ones take scores after a Gaussian along each clip, which looks at later frames and never
    crosses from one clip to another. Scores are not rescaled by clip.

    Args:
        scores: (N,), frames of a clip in order.
        labels: (N,) 0 normal, 1 anomalous.
        clips: the clip of each frame.
        sigma: of the Gaussian, in frames; 0 leaves the scores as they are.

    Returns:
        frame_auroc_micro, frame_auroc_macro, both also with `_smoothed`; None where a class is absent.
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
    """DSC (Dice) and mIoU (intersection over union) of the foreground per image, averaged over images. Raises
    ValueError for empty input, unequal shapes, probabilities outside [0, 1], masks not of 0 and 1.

    Args:
        probability: (N, H, W) in [0, 1].
        masks: (N, H, W) of {0, 1}.
        soft: as in the public code: each image's probabilities stretched to [0, 1] and not thresholded,
            smoothing 1. Otherwise above 0.5 is foreground; an empty mask that is predicted empty counts 1.

    Returns:
        dsc and miou in [0, 1].
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
    smooth = 1.0 if soft else 0.0
    empty = sums + smooth == 0
    dice = np.where(empty, 1, (2 * both + smooth) / np.where(empty, 1, sums + smooth))
    iou = np.where(empty, 1, (both + smooth) / np.where(empty, 1, sums - both + smooth))
    return {"dsc": float(dice.mean()), "miou": float(iou.mean())}


def unias_dice(maps: np.ndarray, masks: np.ndarray) -> float | None:
    """The Dice score of UniAS (WACV 2025): mean over all test images, at one oracle threshold for all.

    The threshold is the one with the largest sum of precision and recall over all pixels; the test masks
    choose it. A pixel at or above it is positive. An image without anomalous pixels counts 1 if nothing is
    predicted, else 0. Raises ValueError for unequal shapes.

    Args:
        maps: (N, H, W) finite, higher is more anomalous.
        masks: (N, H, W) of {0, 1}.

    Returns:
        A fraction; None without an anomalous pixel.
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
