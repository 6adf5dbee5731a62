"""Known answers first, then every fast path against a slow and obvious one."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from skimage.measure import label, regionprops
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from evaluation.metrics import (
    evaluate,
    image_metrics,
    mean_results,
    pixel_metrics,
    region_labels,
)
from evaluation.published_protocol import legacy_pro, smooth_in_order

PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1", "pro", "pro_05")
IMAGE = ("image_auroc", "image_ap", "image_f1", "image_acc")


pytestmark = pytest.mark.filterwarnings("error")  # a division by zero inside is a missing case


def random_set(seed, *, levels=None, shape=(5, 24, 24)):
    """Maps with negative values (`levels` distinct ones, so many ties), masks with regions of all sizes."""
    rng = np.random.default_rng(seed)
    masks = np.zeros(shape, np.uint8)
    for index in range(shape[0] - 1):  # the last image is normal
        for _ in range(4):
            y, x = rng.integers(0, shape[1], 2)
            height, width = rng.integers(1, 7, 2)
            masks[index, y : y + height, x : x + width] = 1
    maps = rng.normal(size=shape) + 1.2 * masks
    if levels:
        maps = np.round(maps * levels / 8)
    return maps.astype(np.float32), masks


def slow_regions(masks):
    """One (image, rows, columns) per 8-connected region."""
    found = []
    for index, mask in enumerate(masks):
        for region in regionprops(label(mask, connectivity=2)):
            found.append((np.full(len(region.coords), index), region.coords[:, 0], region.coords[:, 1]))
    return found


def slow_pro(maps, masks, limit):
    """Every distinct value as a threshold, every region by itself."""
    regions, points, area = slow_regions(masks), [(0.0, 0.0)], 0.0
    for threshold in np.unique(maps)[::-1]:
        positive = maps >= threshold
        overlap = np.mean([positive[region].mean() for region in regions])
        points.append((positive[masks == 0].mean(), overlap))
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 > limit:
            if x0 < limit:
                y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y_limit) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def slow_legacy_pro(maps, masks, thresholds):
    """The published loop, read literally."""
    low, high, rates, overlaps = maps.min(), maps.max(), [], []
    for threshold in np.arange(low, high, (high - low) / thresholds):
        positive = maps > threshold
        pros = []
        for image, mask in zip(positive, masks, strict=True):
            for region in regionprops(label(mask)):  # 8-connected by default
                pros.append(image[region.coords[:, 0], region.coords[:, 1]].sum() / region.area)
        rates.append((positive & (masks == 0)).sum() / (masks == 0).sum())
        overlaps.append(np.mean(pros))
    rates, overlaps = np.array(rates), np.array(overlaps)
    kept = rates < 0.3
    rates = rates[kept]
    return auc((rates - rates.min()) / (rates.max() - rates.min()), overlaps[kept])


def best_f1(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        return np.nanmax(2 * precision * recall / (precision + recall))


# known answers


def test_perfect_map_is_one_everywhere():
    _, masks = random_set(0)
    assert pixel_metrics(masks.astype(np.float32), masks) == dict.fromkeys(PIXEL, 1.0)
    result = image_metrics(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]))
    assert result == dict.fromkeys(IMAGE, 1.0) | {"n_normal": 2, "n_anomalous": 2}
    worst = pixel_metrics(1 - masks.astype(np.float32), masks)
    assert worst["pixel_auroc"] == worst["pro"] == worst["pro_05"] == 0


@pytest.mark.parametrize("value", [-3.5, 0.0, 2.0])
def test_constant_map_is_chance(value):
    _, masks = random_set(0)
    result = pixel_metrics(np.full(masks.shape, value, np.float32), masks)
    share = masks.mean()
    assert result["pixel_auroc"] == 0.5
    assert result["pixel_ap"] == pytest.approx(share)
    assert result["pixel_f1"] == pytest.approx(2 * share / (1 + share))
    assert result["pro"] == pytest.approx(0.15)  # the diagonal up to 0.3, divided by 0.3
    assert result["pro_05"] == pytest.approx(0.025)
    assert legacy_pro(np.full(masks.shape, value), masks) is None
    assert image_metrics(np.full(4, value), np.array([0, 1, 1, 0]))["image_auroc"] == 0.5


def test_pro_by_hand():
    """Two regions, eleven normal pixels: without false alarm one region is covered and half of the other."""
    masks = np.array([[[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]], np.uint8)
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = maps[0, 2, 2] = maps[0, 2, 3] = 2
    maps[0, 0, 3] = 1  # the first false alarm, FPR 1 / 11
    # 0.75 up to the false alarm, then a straight line to (1, 1) over the ties at 0
    at_limit = 0.75 + 0.25 * (0.3 - 1 / 11) / (10 / 11)
    expected = (0.75 / 11 + (0.3 - 1 / 11) * (0.75 + at_limit) / 2) / 0.3
    result = pixel_metrics(maps, masks)
    assert result["pro"] == pytest.approx(expected, abs=1e-12)
    assert result["pro_05"] == pytest.approx(0.75, abs=1e-12)


def test_diagonal_pixels_are_one_region():
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, [0, 1, 2], [0, 1, 2]] = 1
    masks[2, 0, 0] = masks[2, 3, 3] = 1
    regions = region_labels(masks)
    assert regions.dtype == np.int32 and regions.shape == masks.shape
    assert regions[0, 0, 0] == regions[0, 1, 1] == regions[0, 2, 2] == 1
    assert not regions[1].any()
    assert {regions[2, 0, 0], regions[2, 3, 3]} == {2, 3}
    assert np.array_equal(regions > 0, masks == 1)
    assert np.array_equal(region_labels(masks.astype(bool)), regions)


def test_region_labels_agree_with_skimage():
    _, masks = random_set(5, shape=(6, 40, 40))
    regions = region_labels(masks)
    slow = slow_regions(masks)
    assert regions.max() == len(slow)
    ids = [set(regions[region]) for region in slow]
    assert all(len(one) == 1 for one in ids) and set.union(*ids) == set(range(1, len(slow) + 1))


# against the slow and obvious


@pytest.mark.parametrize("levels", [None, 4, 16, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_pixels_agree_with_sklearn(seed, levels):
    maps, masks = random_set(seed, levels=levels)
    result, flat, truth = pixel_metrics(maps, masks), maps.ravel(), masks.ravel()
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-12)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    assert result["pixel_f1"] == pytest.approx(best_f1(truth, flat), abs=1e-12)
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize("levels", [None, 2, 4, 16, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_pro_agrees_with_a_dense_sweep(seed, levels):
    maps, masks = random_set(seed, levels=levels, shape=(4, 16, 16))
    result = pixel_metrics(maps, masks, pro_limits=(0.3, 0.05, 1.0))
    for name, limit in (("pro", 0.3), ("pro_05", 0.05), ("pro_100", 1.0)):
        assert result[name] == pytest.approx(slow_pro(maps, masks, limit), abs=1e-9), name


def test_pro_with_one_pixel_regions():
    rng = np.random.default_rng(3)
    masks = np.zeros((3, 15, 15), np.uint8)
    masks[:, ::5, ::5] = 1
    masks[0, 1:4, 1:4] = 1
    maps = rng.normal(size=masks.shape) + masks
    result = pixel_metrics(maps, masks)
    assert result["pro"] == pytest.approx(slow_pro(maps, masks, 0.3), abs=1e-9)
    assert result["pro_05"] == pytest.approx(slow_pro(maps, masks, 0.05), abs=1e-9)


def test_pro_limit_exactly_on_a_corner():
    """Ten normal pixels with different scores: FPR 0.3 is reached by the third false alarm."""
    masks = np.zeros((1, 1, 16), np.uint8)
    masks[0, 0, [0, 1, 7, 8, 9, 15]] = 1
    maps = np.array([[[9, 4, 8, 7, 6.5, 5, 3, 6.5, 1, 2, 0, -1, -2, -3, -4, -5]]])
    for limit in (0.1, 0.2, 0.3, 0.5):
        result = pixel_metrics(maps, masks, pro_limits=(limit,))
        assert list(result.values())[3] == pytest.approx(slow_pro(maps, masks, limit), abs=1e-12)


@pytest.mark.parametrize("thresholds", [800, 37])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_legacy_pro_agrees_with_the_published_loop(seed, thresholds):
    maps, masks = random_set(seed, shape=(3, 16, 16))
    fast = legacy_pro(maps, masks, thresholds=thresholds)
    assert fast == pytest.approx(slow_legacy_pro(maps, masks, thresholds), abs=1e-6)
    assert type(fast) is float


def test_legacy_pro_is_another_number_than_pro():
    maps, masks = random_set(0, shape=(4, 32, 32))
    outlier = maps.copy()
    outlier[-1, 0, 0] = (
        1000  # one normal pixel: PRO hardly moves, the evenly spaced thresholds all miss the rest
    )
    assert abs(pixel_metrics(outlier, masks)["pro"] - pixel_metrics(maps, masks)["pro"]) < 0.01
    assert abs(legacy_pro(outlier, masks) - legacy_pro(maps, masks)) > 0.03


@pytest.mark.parametrize("levels", [None, 6])
def test_images_agree_with_sklearn(levels):
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, 90)
    scores = rng.normal(size=90) + labels
    if levels:
        scores = np.round(scores * levels / 4)
    result = image_metrics(scores, labels)
    f1 = best_f1(labels, scores)
    assert result["image_auroc"] == roc_auc_score(labels, scores)
    assert result["image_ap"] == average_precision_score(labels, scores)
    assert result["image_f1"] == pytest.approx(f1, abs=1e-12)
    at_best = [scores >= t for t in np.unique(scores)]
    at_best = [p for p in at_best if 2 * (p & (labels == 1)).sum() / (p.sum() + labels.sum()) > f1 - 1e-12]
    assert result["image_acc"] in [float((p == labels).mean()) for p in at_best]
    assert (result["n_normal"], result["n_anomalous"]) == (90 - labels.sum(), labels.sum())
    assert all(type(result[name]) is float for name in IMAGE) and type(result["n_normal"]) is int


@pytest.mark.parametrize("labels", ["100010011", "0100100110011", "100101010110", "0101", "110101"])
def test_accuracy_where_f1_ties_exactly(labels):
    """Against fractions: the best F1, and the accuracy at the lowest threshold that reaches it."""
    labels = np.array([int(label) for label in labels])
    scores, points = np.arange(len(labels), dtype=float), []
    for threshold in scores:
        called = scores >= threshold
        f1 = Fraction(2 * int((called & (labels == 1)).sum()), int(called.sum() + labels.sum()))
        points.append((f1, -threshold, Fraction(int((called == labels).sum()), len(labels))))
    f1, _, accuracy = max(points)
    found = image_metrics(scores, labels)
    assert (found["image_f1"], found["image_acc"]) == (float(f1), float(accuracy))


# what must not change a number


def test_shuffling_the_set_changes_nothing():
    maps, masks = random_set(11, levels=16)
    order = np.random.default_rng(0).permutation(len(maps))
    scores, labels = maps.max(axis=(1, 2)), masks.any(axis=(1, 2))
    before = evaluate(scores, labels, maps, masks)
    after = evaluate(scores[order], labels[order], maps[order], masks[order])
    assert after == pytest.approx(before, abs=1e-12)
    assert legacy_pro(maps[order], masks[order]) == pytest.approx(legacy_pro(maps, masks), abs=1e-12)


@pytest.mark.parametrize(
    "change", [lambda x: 8 * x, lambda x: x / 4 - 3, np.exp2, lambda x: x**3, np.float64]
)
def test_monotone_transforms_change_nothing(change):
    maps, masks = random_set(12, levels=12)  # small integers: the transforms are exact in float32
    assert pixel_metrics(change(maps), masks) == pixel_metrics(maps, masks)


def test_signed_zeros_tie():
    masks = np.array([[[1, 1, 0, 0]]], np.uint8)
    maps = np.array([[[-0.0, 0.0, 0.0, -0.0]]], np.float32)
    assert pixel_metrics(maps, masks) == pixel_metrics(np.zeros_like(maps), masks)


@pytest.mark.parametrize("cores", [None, 1, 8])
def test_number_of_cores_changes_nothing(cores, monkeypatch):
    maps, masks = random_set(15, levels=9)
    few = maps[:1, :1, :4], np.array([[[0, 1, 0, 1]]])  # fewer pixels than cores
    expected = pixel_metrics(maps, masks), pixel_metrics(*few)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert (pixel_metrics(maps, masks), pixel_metrics(*few)) == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.uint8])
def test_other_types_of_maps(dtype):
    maps, masks = random_set(13, levels=20)
    maps -= maps.min()
    expected = pixel_metrics(maps, masks)
    assert pixel_metrics(maps.astype(dtype), masks) == expected
    assert pixel_metrics(maps, masks.astype(dtype)) == expected


def test_strided_input_and_inputs_left_alone():
    maps, masks = random_set(14)
    maps_copy, masks_copy = maps.copy(), masks.copy()
    turned = np.asfortranarray(maps.transpose(0, 2, 1)), masks.transpose(0, 2, 1)
    assert pixel_metrics(*turned) == pytest.approx(pixel_metrics(maps, masks), abs=1e-12)
    legacy_pro(maps, masks)
    assert np.array_equal(maps, maps_copy) and np.array_equal(masks, masks_copy)


# sets without one of the classes


@pytest.mark.parametrize("fill", [0, 1])
def test_one_class_only_is_undefined(fill):
    maps = np.random.default_rng(0).normal(size=(2, 6, 6))
    masks = np.full(maps.shape, fill)
    assert pixel_metrics(maps, masks) == dict.fromkeys(PIXEL)
    assert legacy_pro(maps, masks) is None
    assert region_labels(masks).max() == 2 * fill
    counts = {"n_normal": 3 * (1 - fill), "n_anomalous": 3 * fill}
    assert image_metrics(np.arange(3.0), np.full(3, fill)) == dict.fromkeys(IMAGE) | counts


def test_evaluate_joins_both_and_takes_missing_maps():
    maps, masks = random_set(1)
    scores, labels = maps.mean(axis=(1, 2)), masks.any(axis=(1, 2)).astype(int)
    both = evaluate(scores, labels, maps, masks)
    assert both == image_metrics(scores, labels) | pixel_metrics(maps, masks)
    without = image_metrics(scores, labels) | dict.fromkeys(PIXEL)
    assert evaluate(scores, labels, None, masks) == without == evaluate(scores, labels, maps, None)
    assert list(without) == list(both)


def test_mean_ignores_none_and_sums_counts():
    results = [
        {"image_auroc": 0.5, "pro": None, "pro_05": None, "n_normal": 3, "n_anomalous": 1},
        {"image_auroc": 1.0, "pro": 0.25, "pro_05": None, "n_normal": 4, "n_anomalous": 0},
    ]
    counts = {"n_normal": 7, "n_anomalous": 1}
    assert mean_results(results) == {"image_auroc": 0.75, "pro": 0.25, "pro_05": None} | counts


# the filter along the list of images


def test_smoothing_in_order_reads_the_labels_of_neighbours():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    scores = rng.normal(size=200) + 1.8 * labels
    order = rng.permutation(200)
    plain = image_metrics(scores, labels)["image_auroc"]
    in_order = image_metrics(smooth_in_order(scores), labels)["image_auroc"]
    shuffled = image_metrics(smooth_in_order(scores[order]), labels[order])["image_auroc"]
    assert 0.86 < plain < 0.94
    assert in_order > 0.99
    assert shuffled < plain


# wrong input, told in one line


def maps_with(value, dtype=np.float32):
    maps = np.zeros((1, 2, 2), dtype)
    maps[0, 0, 0] = value
    return maps


MASKS = np.array([[[0, 1], [0, 0]]])


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (maps_with(np.nan), MASKS, "maps .* finite"),
        (maps_with(-np.inf), MASKS, "maps .* finite"),
        (maps_with(1e300, np.float64), MASKS, "maps .* finite float32"),
        (maps_with(1), MASKS[:, :1], r"maps \(1, 2, 2\) and masks \(1, 1, 2\) must have the same shape"),
        (maps_with(1), MASKS * 255, "masks must hold only 0 and 1, found 255"),
        (maps_with(1), MASKS * 0.5, "masks must hold only 0 and 1, found 0.5"),
        (maps_with(1), MASKS * np.nan, "masks must hold only 0 and 1, found nan"),
        (maps_with(1), -MASKS, "masks must hold only 0 and 1, found -1"),
        (maps_with(1)[None], MASKS[None], r"masks \(1, 1, 2, 2\) must be \(N, H, W\)"),
        (np.zeros((0, 4, 4)), np.zeros((0, 4, 4)), r"\(0, 4, 4\) must not be empty"),
    ],
)
def test_wrong_maps_and_masks(maps, masks, message):
    for metric in (pixel_metrics, legacy_pro):
        with pytest.raises(ValueError, match=message) as error:
            metric(maps, masks)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "scores .* finite"),
        ([0.1, 0.2], [0, 1, 1], "equal length"),
        ([[0.1, 0.2]], [[0, 1]], "1-D"),
        ([0.1, 0.2], [0, -1], "labels must hold only 0 and 1, found -1"),
        ([], [], "at least one"),
    ],
)
def test_wrong_scores_and_labels(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        image_metrics(np.array(scores), np.array(labels))


def test_other_wrong_arguments():
    maps = maps_with(1)
    with pytest.raises(ValueError, match="fractions"):
        pixel_metrics(maps, MASKS, pro_limits=(30,))
    with pytest.raises(ValueError, match="at least 1"):
        legacy_pro(maps, MASKS, thresholds=0)
    with pytest.raises(ValueError, match="1 maps for 2 image scores"):
        evaluate(np.array([0.1, 0.2]), np.array([0, 1]), maps, MASKS)
    with pytest.raises(ValueError, match="at least one category"):
        mean_results([])
    for scores, sigma in ((np.zeros(0), 4), (np.array([np.nan]), 4), (np.zeros((2, 2)), 4), (np.zeros(3), 0)):
        with pytest.raises(ValueError, match="scores"):
            smooth_in_order(scores, sigma)
