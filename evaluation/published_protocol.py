"""Numbers as the first public evaluation of UniNet computed them, to compare with published tables: not fair.

docs/REPRODUCTION.md says how they differ from the fair protocol, and by how much.
"""

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import auc

from evaluation import metrics
from evaluation.scoring import Scores, as_slice, results_by_category, row_name
from model.detector import Detector
from utils.config import Config

UNFAIR = "not a fair protocol"


def april_detector(detector: Detector) -> Detector:
    """The same run with the score of then: that of 1 - exp(map - its maximum), so of the low distances.

    The decision of `detector.model` is changed; what `detector` has deployed stays.
    """
    decision = detector.model.decision
    detector.model.decision = replace(decision, score_map="legacy_exp", score_sigma=0.0)
    return replace(detector)


def april_results(scores: Scores, config: Config) -> dict[str, metrics.Results]:
    """Metrics by category as the first public evaluation computed them.

    Scores are smoothed along each category's list of test images, in folder order; PRO is `legacy_pro`; DSC
    and mIoU are soft. Pixel AUROC and AP are as ever.
    """
    extra = (*config.run.extra_metrics, "soft_dsc")
    results = results_by_category(scores, replace(config.run, extra_metrics=extra))
    del results["mean"]
    for category in dict.fromkeys(s.category for s in scores.samples):
        chosen = np.array([s.category == category and s.label >= 0 for s in scores.samples])
        row, part = results[row_name(category)], as_slice(np.flatnonzero(chosen))
        row |= metrics.image_metrics(smooth_in_order(scores.score[chosen]), scores.labels[chosen])
        row |= {name: row.pop(f"{name}_soft") for name in ("dsc", "miou") if name in row}
        pro = None if scores.masks is None else legacy_pro(scores.maps[part], scores.masks[part])
        row |= {"pro": pro, "pro_05": None}
    return results | {"mean": metrics.mean_results(list(results.values()))}


def legacy_pro(maps: np.ndarray, masks: np.ndarray, *, thresholds: int = 800) -> float | None:
    """PRO over evenly spaced thresholds from the least to the highest score; a pixel above one is positive.

    Points of a false positive rate strictly below 0.3 are kept, and their rates stretched to [0, 1] before
    the area is taken. So the number depends on outliers and on where the thresholds fall. None where it is
    undefined: a class is absent, a constant map, fewer than two rates kept.
    maps, masks: (N, H, W) as for `pixel_metrics`, with the same errors. thresholds: how many (1 or more).
    """
    if thresholds < 1:
        raise ValueError(f"thresholds {thresholds} must be at least 1; the published evaluation used 800")
    pixels = metrics.split_pixels(maps, masks)
    low, high = np.float32(np.min(maps)), np.float32(np.max(maps))  # the published step is rounded to float32
    if low == high or not (pixels.n_normal and pixels.anomalous.size):
        return None
    levels = metrics.ordered_keys(np.arange(low, high, (high - low) / thresholds))
    _, at_most = metrics.count_below(maps, masks, levels)
    fpr = (pixels.n_normal - at_most) / pixels.n_normal
    missed = np.searchsorted(pixels.anomalous, levels, side="right")
    overlap = 1 - np.append(0, np.cumsum(pixels.share))[missed]
    kept = fpr < 0.3
    if not kept.any() or np.ptp(fpr[kept]) == 0:
        return None
    return float(auc((fpr[kept] - fpr[kept].min()) / np.ptp(fpr[kept]), overlap[kept]))


def smooth_in_order(scores: np.ndarray, sigma: float = 4.0) -> np.ndarray:
    """Image scores (N,) after a 1-D Gaussian along the list.

    Neighbours in folder order mostly share a class, so this leaks labels, and the order changes the result.
    Raises ValueError for empty input, other than one dimension, values not finite, or sigma not positive.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1 or not sigma > 0:
        raise ValueError(f"scores {scores.shape} must be 1-D and sigma {sigma} positive")
    return gaussian_filter1d(metrics.check_finite(scores, "scores").astype(np.float64), sigma)
