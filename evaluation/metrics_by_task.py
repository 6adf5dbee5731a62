"""Frame-level metrics of video: over all test frames, and averaged over clips, with and without smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import roc_auc_score

from evaluation.metrics import Results


def frame_metrics(scores: np.ndarray, labels: np.ndarray, clips: Sequence[str], *, sigma: float) -> Results:
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
    names = np.asarray(clips)
    parts = [np.flatnonzero(names == name) for name in dict.fromkeys(clips)]
    smoothed = np.array(scores, dtype=np.float64)
    for part in parts:
        smoothed[part] = smooth_clip(smoothed[part], sigma)
    results: Results = {}
    for suffix, values in (("", np.asarray(scores, dtype=np.float64)), ("_smoothed", smoothed)):
        both = [part for part in parts if 0 < labels[part].sum() < len(part)]
        mixed = 0 < labels.sum() < len(labels)
        results[f"frame_auroc_micro{suffix}"] = float(roc_auc_score(labels, values)) if mixed else None
        macro = [float(roc_auc_score(labels[part], values[part])) for part in both]
        results[f"frame_auroc_macro{suffix}"] = fmean(macro) if macro else None
    return results


def smooth_clip(scores: np.ndarray, sigma: float) -> np.ndarray:
    """Scores (N,) of one clip after a Gaussian of `sigma` frames, the ends mirrored."""
    return gaussian_filter1d(scores, sigma) if sigma > 0 else scores
