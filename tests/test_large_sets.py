"""Large test sets: metrics in chunks, merged levels, 16-bit maps, memory beyond the maps."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT

import utils.metrics
from datasets.loader import ImageSet
from datasets.samples import Sample
from datasets.transforms import Decode, Normalise
from model.decision import Prediction
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.evaluation import Scores, results_by_category, score_images
from utils.metrics import legacy_pro, pixel_metrics
from utils.runs import config_hash


def test_chunks_of_images_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    maps, masks = rng.normal(size=(7, 12, 10)).astype(np.float32).round(2), rng.random((7, 12, 10)) < 0.1
    whole = pixel_metrics(maps, masks), legacy_pro(maps, masks, thresholds=50)
    monkeypatch.setattr(utils.metrics, "CHUNK", 2 * 120 + 1)  # two images, the last alone
    assert (pixel_metrics(maps, masks), legacy_pro(maps, masks, thresholds=50)) == whole


@pytest.mark.parametrize("levels", [200, 1000])
def test_merged_levels_stay_within_their_bound(monkeypatch, levels):
    """Of 4,000 distinct scores neighbours are merged; no metric moves by more than 1 / levels."""
    rng = np.random.default_rng(4)
    masks = np.zeros((20, 40, 40), np.uint8)
    masks[:, 5:15, 5:25] = 1
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    exact = pixel_metrics(maps, masks)
    monkeypatch.setattr(utils.metrics, "MAX_LEVELS", levels)
    merged = pixel_metrics(maps, masks)
    assert merged != exact
    for name, value in exact.items():
        assert merged[name] == pytest.approx(value, abs=1 / levels), name


def test_half_precision_maps():
    rng = np.random.default_rng(5)
    masks = np.zeros((6, 32, 32), np.uint8)
    masks[::2, 4:14, 4:14] = 1
    maps = (rng.random(masks.shape) + 0.4 * masks).astype(np.float16)
    assert pixel_metrics(maps, masks) == pixel_metrics(maps.astype(np.float32), masks)


class Brightness(torch.nn.Module):
    """The map is the first channel."""

    def predict(self, images):
        return Prediction(images[:, 0], images[:, 0].amax(dim=(1, 2)))


def generated_set(count):
    samples = [
        Sample(ROOT / f"{i}.png", i % 2, None, f"part{i // 4}", "test", "spot", str(i)) for i in range(count)
    ]

    class Generated(ImageSet):
        def pixels(self, index):
            return np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)

        def mask(self, index):
            mask = np.zeros((32, 32), np.uint8)
            mask[4:9, 4:20] = index % 2
            return mask

    data = Generated(samples, Decode((32, 32)), Normalise((0.5,) * 3, (0.5,) * 3))
    data.has_masks = True
    return data


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_map_dtype(make_config, dtype):
    """Half the memory, and metrics that differ by the rounding of the maps alone."""
    data, options = generated_set(8), {"batch_size": 3, "device": torch.device("cpu"), "precision": "fp32"}
    scores = score_images(Brightness(), data, map_dtype=dtype, quiet=True, **options)
    assert scores.maps.dtype == dtype
    whole = score_images(Brightness(), data, quiet=True, **options)
    assert np.array_equal(scores.score, whole.score)
    found, exact = (results_by_category(s, make_config().eval)["mean"] for s in (scores, whole))
    for name in ("pixel_auroc", "pixel_ap", "pro"):
        assert found[name] == pytest.approx(exact[name], abs=1e-3)


def test_memory_beyond_the_maps_does_not_grow(make_config, monkeypatch):
    """Metrics of twice the images take the same memory besides the maps, masks and anomalous pixels."""
    monkeypatch.setattr(utils.metrics, "CHUNK", 1 << 16)
    peaks = []
    for count in (64, 128):
        samples = [Sample(ROOT / "x.png", i % 2, None, "part", "test", "", "") for i in range(count)]
        maps = np.random.default_rng(0).random((count, 128, 128), dtype=np.float32)
        masks = np.zeros(maps.shape, np.uint8)
        masks[1::2, 3:9, 3:9] = 1
        scores = Scores(samples, maps.max((1, 2)), maps, masks, 0.0)
        tracemalloc.start()
        results_by_category(scores, make_config().eval)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[0] < 2e6  # the smaller set's maps have 4 MB


def test_a_younger_setting_leaves_runs_and_checkpoints_as_they_were(make_config, tmp_path):
    config = make_config()
    tree = config.to_dict()
    del tree["eval"]["map_dtype"]
    Checkpoint(config, {}, 1).save(tmp_path / "new.pt")
    old = torch.load(tmp_path / "new.pt", weights_only=True) | {"config": tree}
    torch.save(old, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").config == load_checkpoint(tmp_path / "new.pt").config
    half = dataclasses.replace(config, eval=dataclasses.replace(config.eval, map_dtype="float16"))
    assert config_hash(half) != config_hash(config)
