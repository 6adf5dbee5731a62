"""Image and pixel metrics, exact, and fast enough to run after every training.

Legend: N images, H x W pixels, P anomalous pixels, K distinct scores among these, R regions.

Between two neighbouring scores of anomalous pixels only false positives change, so the points at these K
scores fix every curve. The anomalous pixels are sorted as (score, region), packed in 64 bits. The normal ones
are counted against their scores in chunks of images, as 32-bit keys sorted in one piece per core. So memory
beyond the maps is that of one chunk and of the anomalous pixels. Counts are integers and lose no precision.

Scores of pixels are compared as float32. No metric depends on the order of the images.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import NamedTuple

import cv2
import numpy as np
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from utils.runs import Results

Curve = list[tuple[float, float]]  # points to draw
PRO_LIMITS = (0.3, 0.05)
CHUNK = 1 << 24  # pixels that are looked at together: 256 images of 256 x 256
MAX_LEVELS = 1 << 20  # of more distinct scores of anomalous pixels, neighbours are taken as tied


def evaluate(
    scores: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray | None,
    masks: np.ndarray | None,
    *,
    curve: Curve | None = None,
) -> Results:
    """`image_metrics` and `pixel_metrics` of one category, the latter None without maps or masks.

    Scores and labels are (N,), maps and masks (N, H, W), all in the same order, else a ValueError.
    """
    results = image_metrics(scores, labels)
    if maps is None or masks is None:
        return results | dict.fromkeys(_pixel_names(PRO_LIMITS))
    if len(maps) != len(scores):
        raise ValueError(f"{len(maps)} maps for {len(scores)} image scores: give one map per image")
    return results | pixel_metrics(maps, masks, curve=curve)


def mean_results(results: Sequence[Results]) -> Results:
    """Mean over categories, each counted once; `n_normal` and `n_anomalous` are summed.

    A category whose metric is None is left out of that metric's mean, which is None if no category has it.
    """
    if not results:
        raise ValueError("no results to average: give at least one category")
    mean: Results = {}
    for name in dict.fromkeys(name for result in results for name in result):
        values = [value for result in results if (value := result.get(name)) is not None]
        if name in ("n_normal", "n_anomalous"):
            mean[name] = sum(values)
        else:
            mean[name] = fmean(values) if values else None
    return mean


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> Results:
    """AUROC, AP, F1 and accuracy of whole images, ties as in scikit-learn; None if a class is absent.

    F1 is the best over all thresholds, accuracy is taken at that threshold (the lowest among equals). The
    test labels choose it: an oracle, as in the published tables, not what a deployed detector reaches.
    scores: (N,) finite, higher is more anomalous. labels: (N,) 0 or 1. Anything else is a ValueError.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be 1-D and of equal length")
    scores, labels = check_finite(scores, "scores").astype(np.float64), check_binary(labels, "labels")
    n_anomalous = int(np.count_nonzero(labels))
    results: Results = dict.fromkeys(("image_auroc", "image_ap", "image_f1", "image_acc"))
    results |= {"n_normal": labels.size - n_anomalous, "n_anomalous": n_anomalous}
    if 0 < n_anomalous < labels.size:
        results["image_auroc"] = float(roc_auc_score(labels, scores))
        results["image_ap"] = float(average_precision_score(labels, scores))
        results["image_f1"], results["image_acc"] = _best_f1(scores, labels)
    return results


def pixel_metrics(
    maps: np.ndarray,
    masks: np.ndarray,
    *,
    pro_limits: tuple[float, ...] = PRO_LIMITS,
    curve: Curve | None = None,
) -> Results:
    """AUROC, AP, F1 (best threshold, an oracle) and PRO over all pixels, all None if a class is absent.

    PRO (Bergmann et al., IJCV 2021): mean covered share of all regions of the set against the false positive
    rate over all its normal pixels, from (0, 0), interpolated at the limit; the area is divided by the limit.
    Exact up to 2^20 distinct scores of anomalous pixels; of more, neighbours among these count as tied.
    maps: (N, H, W) finite, of any real type. masks: (N, H, W) of {0, 1}. Anything else is a ValueError.
    pro_limits: rates in (0, 1]; 0.3 is named `pro`, others by percentage, 0.05 `pro_05`.
    curve: receives the points of PRO up to a false positive rate of 0.3.
    """
    if not all(0 < limit <= 1 for limit in pro_limits):
        raise ValueError(f"pro_limits {pro_limits} must lie in (0, 1]: give fractions such as 0.3")
    names = _pixel_names(pro_limits)
    pixels = split_pixels(maps, masks)
    n_normal, n_anomalous = pixels.n_normal, pixels.anomalous.size
    if not (n_normal and n_anomalous):
        return dict.fromkeys(names)
    tp, fp, fp_before, covered = _curve(pixels, maps, masks)
    new_tp = np.diff(tp, prepend=0)
    # Mann-Whitney in integers: each anomalous pixel against the normal ones below it, ties count half
    auroc = float(new_tp @ (2 * n_normal - fp - fp_before)) / (2 * n_normal * n_anomalous)
    ap = float(new_tp @ (tp / (tp + fp))) / n_anomalous
    f1 = float(np.max(2 * tp / (tp + fp + n_anomalous)))
    # K + 1 flat pieces of the PRO curve, from one score to the next, joined by straight lines over ties
    fpr = np.stack([np.append(0, fp), np.append(fp_before, n_normal)], axis=1).reshape(-1) / n_normal
    overlap = np.repeat(np.append(0, covered), 2)
    if curve is not None:
        curve += few_points(fpr, overlap, PRO_LIMITS[0])
    return dict(zip(names, [auroc, ap, f1, *(area_up_to(fpr, overlap, x) for x in pro_limits)], strict=True))


def few_points(x: np.ndarray, y: np.ndarray, limit: float = 1.0) -> Curve:
    """Points of a curve (x ascending) up to a limit of x, evenly thinned to some hundreds for a plot."""
    end = int(np.searchsorted(x, limit, side="right"))
    step = max(1, end // 400)
    chosen = [*range(0, end, step), *range(end)[-1:]]
    return list(zip(x[chosen].tolist(), y[chosen].tolist(), strict=True))


def counts_by_score(maps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K distinct scores of anomalous pixels (at least one), descending; true and false positives at each.
    Raises ValueError as `pixel_metrics`.
    """
    pixels = split_pixels(maps, masks)
    curve = _curve(pixels, maps, masks, most=pixels.anomalous.size)
    keys = pixels.anomalous[::-1][curve.tp - 1]
    bits = np.where(keys >> 31, keys ^ np.uint32(0x80000000), ~keys)  # `ordered_keys` backwards
    return bits.astype(np.uint32).view(np.float32), curve.tp, curve.fp


def region_labels(masks: np.ndarray) -> np.ndarray:
    """The 8-connected regions of a set, numbered: (N, H, W) of {0, 1} to int32, 0 normal, else 1 to R."""
    masks = check_binary(_three_dimensional(masks), "masks")
    regions = np.zeros(masks.shape, np.int32)
    count_before = 0
    for index in np.flatnonzero(masks.any(axis=(1, 2))):
        count, labels = cv2.connectedComponents(masks[index], connectivity=8, ltype=cv2.CV_32S)
        np.add(labels, count_before, out=regions[index], where=labels > 0)
        count_before += count - 1
    return regions


class _Pixels(NamedTuple):
    n_normal: int
    anomalous: np.ndarray  # (P,) uint32 keys, ascending
    share: np.ndarray  # (P,) its part of the mean overlap: 1 / (R * area of its region)


class _Curve(NamedTuple):
    """At the K distinct scores of anomalous pixels, descending, if they and all above are called positive."""

    tp: np.ndarray  # (K,) anomalous pixels
    fp: np.ndarray  # (K,) normal pixels
    fp_before: np.ndarray  # (K,) normal pixels strictly above; the rest are ties
    overlap: np.ndarray  # (K,) mean covered share of the regions


def split_pixels(maps: np.ndarray, masks: np.ndarray) -> _Pixels:
    """What the curves of maps and masks (N, H, W) are made of."""
    maps, masks = np.asarray(maps), np.asarray(masks)
    if maps.shape != masks.shape:
        raise ValueError(f"maps {maps.shape} and masks {masks.shape} must have the same shape (N, H, W)")
    _three_dimensional(masks)
    parts, n_regions, n_normal = [np.zeros(0, np.uint64)], 0, 0
    for keys, part in _chunks(maps, masks):
        regions = region_labels(part).reshape(-1)
        anomalous = np.flatnonzero(regions)
        packed = keys[anomalous].astype(np.uint64) << np.uint64(32)
        packed |= (regions[anomalous] + n_regions).view(np.uint32)
        parts.append(packed)
        n_regions, n_normal = n_regions + int(regions.max()), n_normal + keys.size - anomalous.size
    packed = np.concatenate(parts)
    packed.sort()
    ids = (packed & np.uint64(0xFFFFFFFF)).astype(np.int32) - 1
    areas = np.bincount(ids)
    return _Pixels(n_normal, (packed >> np.uint64(32)).astype(np.uint32), (1 / (areas.size * areas))[ids])


def _chunks(maps: np.ndarray, masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys of the pixels, flat, and masks (n, H, W) of some images after the other."""
    if not maps.size:
        raise ValueError(f"maps {maps.shape} must not be empty")
    images = max(1, CHUNK // (maps.shape[1] * maps.shape[2]))
    for i in range(0, len(maps), images):
        with np.errstate(over="ignore"):  # too large for float32 is reported as not finite
            part = check_finite(maps[i : i + images].astype(np.float32, copy=False), "maps")
        yield ordered_keys(part), masks[i : i + images]


def ordered_keys(values: np.ndarray) -> np.ndarray:
    """Flat uint32 in the order of the floats: all bits of negatives flip, only the sign bit of the others."""
    bits = np.add(values, 0, dtype=np.float32).reshape(-1).view(np.uint32)  # -0 + 0 is +0: they tie
    flip = (bits.view(np.int32) >> 31).view(np.uint32)
    flip |= np.uint32(0x80000000)
    bits ^= flip
    return bits


def count_below(maps: np.ndarray, masks: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many normal pixels lie below each level, and how many not above it."""
    cores = min(os.cpu_count() or 1, 8)
    counts = np.zeros((2, levels.size), np.int64)

    def add(pieces: list[np.ndarray], part: slice) -> None:
        for piece in pieces:
            counts[0, part] += np.searchsorted(piece, levels[part], "left")
            counts[1, part] += np.searchsorted(piece, levels[part], "right")

    ends = np.linspace(0, levels.size, cores + 1).astype(int).tolist()
    shares = [slice(*pair) for pair in itertools.pairwise(ends)]
    with ThreadPoolExecutor(cores) as pool:  # NumPy sorts and searches without the GIL
        for keys, part in _chunks(np.asarray(maps), np.asarray(masks)):
            pieces = np.array_split(keys[part.reshape(-1) == 0], cores)
            list(pool.map(np.ndarray.sort, pieces))
            list(pool.map(add, [pieces] * cores, shares))
    return counts[0], counts[1]


def _curve(pixels: _Pixels, maps: np.ndarray, masks: np.ndarray, most: int | None = None) -> _Curve:
    keys = pixels.anomalous[::-1]
    last = np.flatnonzero(np.append(keys[1:] != keys[:-1], True))  # of each run of ties
    step = -(-last.size // (most or MAX_LEVELS))
    last = last[::-step][::-1]  # the lowest score stays
    below, at_most = count_below(maps, masks, keys[last][::-1])  # ascending levels are kinder to the cache
    overlap = np.cumsum(pixels.share[::-1])[last]
    fp = pixels.n_normal - below[::-1]
    # where neighbours were merged, all above the next kept score counts as tied with it
    before = pixels.n_normal - at_most[::-1] if step == 1 else np.append(0, fp[:-1])
    return _Curve(last + 1, fp, before, overlap / overlap[-1])


def area_up_to(fpr: np.ndarray, overlap: np.ndarray, limit: float) -> float:
    """Area under a curve (fpr ascending) from 0 to a limit, divided by the limit."""
    end = np.searchsorted(fpr, limit, side="right")
    share = np.append(overlap[:end], np.interp(limit, fpr, overlap))
    return float(auc(np.append(fpr[:end], limit), share)) / limit


def _best_f1(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Best F1, and the accuracy at the lowest threshold that reaches it.

    F1 is one division of integers, which is rounded correctly, so thresholds that tie exactly tie here.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of equal scores
    hits, called = np.cumsum(labels[order], dtype=np.int64)[last], last + 1
    f1 = 2 * hits / (called + int(labels.sum()))
    best = np.flatnonzero(f1 == f1.max())[-1]  # scores descend: the last one is the lowest
    right = 2 * hits[best] - called[best] + np.count_nonzero(labels == 0)
    return float(f1[best]), float(right / labels.size)


def _pixel_names(limits: Sequence[float]) -> list[str]:
    pro = ["pro" if limit == 0.3 else f"pro_{100 * limit:02g}" for limit in limits]
    return ["pixel_auroc", "pixel_ap", "pixel_f1", *pro]


def _three_dimensional(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.ndim != 3:
        raise ValueError(f"masks {masks.shape} must be (N, H, W): drop the channel dimension if there is one")
    return masks


def check_finite(values: np.ndarray, name: str) -> np.ndarray:
    """The values; ValueError if there is none, or if one is not finite."""
    if not (values.size and np.isfinite(values).all()):
        raise ValueError(f"{name} {values.shape} must hold finite {values.dtype} values, at least one")
    return values


def check_binary(values: np.ndarray, name: str) -> np.ndarray:
    """The values as uint8; ValueError if there is none, or if one is neither 0 nor 1."""
    ones = np.ascontiguousarray(values).astype(bool)
    if not ones.size:
        raise ValueError(f"{name} {values.shape} must not be empty")
    if values.dtype != bool and not np.array_equal(ones, values):
        raise ValueError(f"{name} must hold only 0 and 1, found {values[ones != values].flat[0]}")
    return ones.view(np.uint8)
