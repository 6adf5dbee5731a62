"""The one scoring path: a model's maps and scores on a set of images, and the metrics of each category."""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from datasets.loader import ImageSet
from datasets.samples import Sample
from evaluation.metrics import Curve, Results, evaluate, mean_results
from evaluation.metrics_by_task import aupimo, frame_metrics, segmentation_metrics, unias_dice
from model.base import AnomalyModel
from model.detector import Calibration
from model.inference import Predicted, ScoringOptions, predictions
from utils.config import RunOptions

_log = logging.getLogger("uninet")
IN_MEMORY = 2 << 30  # bytes of maps, and as much of masks, that are kept in memory


@dataclass
class Scores:
    """Predictions of a set, in its order: score (N,), maps and masks (N, H, W); masks are None if unknown."""

    samples: list[Sample]
    score: np.ndarray
    maps: np.ndarray
    masks: np.ndarray | None
    ms_per_image: float
    kind: str = "detection"  # detection | segmentation (maps are probabilities) | video (groups are clips)
    pro_curves: dict[str, Curve] = field(default_factory=dict)  # of each category that was measured

    @property
    def labels(self) -> np.ndarray:
        """(N,) 0, 1 or -1."""
        return np.array([s.label for s in self.samples])


def score_images(
    model: AnomalyModel, data: ImageSet, options: ScoringOptions, *, indices: range | None = None
) -> Scores:
    """Predict as `predictions` and keep maps and masks."""
    return collect_scores(predictions(model, data, options, indices=indices), data, indices)


def collect_scores(predicted: Iterable[Predicted], data: ImageSet, indices: range | None = None) -> Scores:
    """The predictions of `data` (or those of `indices`), with their masks, as one object.

    Time is the model's alone: decoding is not counted, but on a CPU its threads share the cores meanwhile.
    """
    indices = range(len(data)) if indices is None else indices
    shape = (len(indices), *data.decode.size)
    score, maps = np.empty(len(indices)), _room(shape, np.float32)
    masks = _room(shape, np.uint8) if data.has_masks else None
    seconds, done = 0.0, 0
    for found in predicted:
        part = slice(done, done + len(found.score))
        score[part], maps[part] = found.score, found.maps
        if masks is not None:
            masks[part] = found.batch["mask"][:, 0].numpy()
        seconds, done = seconds + found.seconds, part.stop
    samples = [data.samples[i] for i in indices]
    return Scores(samples, score, maps, masks, 1000 * seconds / max(done, 1), kind=data.kind)


def join_scores(parts: list[Scores]) -> Scores:
    """One set's scores from those of its shards, in order."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        samples=[sample for part in parts for sample in part.samples],
        score=np.concatenate([part.score for part in parts]),
        maps=np.concatenate([part.maps for part in parts]),
        masks=None if parts[0].masks is None else np.concatenate([part.masks for part in parts]),
    )


def _room(shape: tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    """An array; a large one is a nameless temporary file, which the system writes when memory is short."""
    size, folder = math.prod(shape) * np.dtype(kind).itemsize, tempfile.gettempdir()
    if size <= IN_MEMORY:
        return np.empty(shape, kind)
    if shutil.disk_usage(folder).free < size + IN_MEMORY:
        lacking = "%s lacks room for %.1f GB of maps: kept in memory (TMPDIR chooses another folder)"
        _log.warning(lacking, folder, size / 2**30)
        return np.empty(shape, kind)
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full is told of here, not by a dead process later
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, kind, "r+", shape=shape)


def calibrate(held_out: Scores) -> Calibration:
    """Scores and colour scale of held-out normals.

    The scale begins at the median of their maps and ends at twice the distance to their 99.9th percentile, so
    that normal images use its lower half.
    """
    low = float(np.median(held_out.maps))
    high = float(np.quantile(held_out.maps, 0.999))
    return Calibration(tuple(map(float, held_out.score)), low, low + 2 * max(high - low, 1e-6))


def results_by_category(
    scores: Scores, options: RunOptions, trained_defects: frozenset[str] = frozenset()
) -> dict[str, Results]:
    """Metrics of each category (its pixels and regions only), and their mean under "mean".

    Where training saw anomalies (kinds `trained_defects`) but not all kinds that are tested, the rows
    "<category>/seen" and "<category>/unseen" follow: normal images with the anomalous ones of these kinds.
    Raises ValueError if there is no labelled image.
    """
    labels = scores.labels
    known = np.array([s.defect in trained_defects for s in scores.samples])
    _log.info("measuring on %d images ...", len(labels))  # PRO and pixel metrics sort every pixel
    for extra in options.extra_metrics:
        if scores.masks is None or (extra == "soft_dsc" and scores.kind != "segmentation"):
            _log.warning("%s is left out; it needs masks, soft_dsc a set of segmentation, too", extra)
    results: dict[str, Results] = {}
    for category in dict.fromkeys(s.category for s in scores.samples):
        chosen = np.array([s.category == category and s.label >= 0 for s in scores.samples])
        if not chosen.any():
            continue
        row = row_name(category)
        curve = scores.pro_curves[category] = []
        results[row] = _results_of(scores, chosen, options, curve)
        if trained_defects and (chosen & (labels == 1) & ~known).any():
            for name, kind in (("seen", known), ("unseen", ~known)):
                results[f"{row}/{name}"] = _results_of(scores, chosen & ((labels == 0) | kind), options)
    if not results:
        raise ValueError("the test set has no labelled image, so there is nothing to measure")
    results["mean"] = mean_results([r for name, r in results.items() if "/" not in name])
    return results


def row_name(category: str) -> str:
    """The name of a category's row: its own, unless that is "mean", which is the mean's."""
    return "mean (category)" if category == "mean" else category


def _results_of(
    scores: Scores, chosen: np.ndarray, options: RunOptions, curve: Curve | None = None
) -> Results:
    """Metrics of the samples where `chosen` (N,) is true."""
    labels, part = scores.labels[chosen], as_slice(np.flatnonzero(chosen))
    masks = None if scores.masks is None else scores.masks[part]
    maps = None if scores.masks is None else scores.maps[part]
    results = evaluate(scores.score[chosen], labels, maps, masks, curve=curve)
    if maps is not None and masks is not None:
        if "aupimo" in options.extra_metrics:
            results["aupimo"] = aupimo(maps, masks, labels)
        if "dsc_unias" in options.extra_metrics:
            results["dsc_unias"] = unias_dice(maps, masks)
        if scores.kind == "segmentation":
            found = segmentation_metrics(maps, masks)
            if "soft_dsc" in options.extra_metrics:
                soft = segmentation_metrics(maps, masks, soft=True)
                found |= {f"{name}_soft": value for name, value in soft.items()}
            results |= found if masks.any() else dict.fromkeys(found)  # if all are empty, all would be found
    if scores.kind == "video":
        clips = [scores.samples[i].group for i in np.flatnonzero(chosen)]
        results |= frame_metrics(scores.score[chosen], labels, clips)
    return results


def as_slice(index: np.ndarray) -> np.ndarray | slice:
    """Ascending indices (at least one) as a slice, which copies nothing, if they are one piece."""
    whole = len(index) == index[-1] - index[0] + 1
    return slice(int(index[0]), int(index[-1]) + 1) if whole else index
