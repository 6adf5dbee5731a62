"""Large test sets: metrics in chunks, merged levels, 16-bit maps, memory beyond the maps."""

import dataclasses
import tempfile
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import printed_commands
import pytest
import torch
from conftest import ROOT, TINY

import evaluation.metrics
import evaluation.scoring
from datasets.loader import ImageSet, batches
from datasets.samples import Sample
from datasets.transforms import Decode, Normalise
from evaluation.metrics import pixel_metrics
from evaluation.published_protocol import legacy_pro
from evaluation.scoring import Scores, results_by_category, score_images
from model import load_detector
from model.decision import Prediction
from model.inference import ScoringOptions
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.errors import DatasetError
from utils.runs import config_hash


def test_chunks_of_images_change_nothing(monkeypatch):
    rng = np.random.default_rng(3)
    maps, masks = rng.normal(size=(7, 12, 10)).astype(np.float32).round(2), rng.random((7, 12, 10)) < 0.1
    whole = pixel_metrics(maps, masks), legacy_pro(maps, masks, thresholds=50)
    monkeypatch.setattr(evaluation.metrics, "CHUNK", 2 * 120 + 1)  # two images, the last alone
    assert (pixel_metrics(maps, masks), legacy_pro(maps, masks, thresholds=50)) == whole


@pytest.mark.parametrize("levels", [200, 1000])
def test_merged_levels_stay_within_their_bound(monkeypatch, levels):
    """Of 4,000 distinct scores neighbours are merged; no metric moves by more than 1 / levels."""
    rng = np.random.default_rng(4)
    masks = np.zeros((20, 40, 40), np.uint8)
    masks[:, 5:15, 5:25] = 1
    maps = rng.normal(size=masks.shape) + 1.5 * masks
    exact = pixel_metrics(maps, masks)
    monkeypatch.setattr(evaluation.metrics, "MAX_LEVELS", levels)
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


OPTIONS = ScoringOptions(3, torch.device("cpu"), "fp32", quiet=True)


def test_maps_of_a_large_set_are_in_a_temporary_file(make_config, monkeypatch, tmp_path, caplog):
    """The same numbers, and no file is left; without room on the disk they stay in memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data, every = (
        generated_set(8),
        dataclasses.replace(make_config().run, extra_metrics=("aupimo", "dsc_unias")),
    )
    small = score_images(Brightness(), data, OPTIONS)
    monkeypatch.setattr(evaluation.scoring, "IN_MEMORY", 1000)
    large = score_images(Brightness(), data, OPTIONS)
    assert not isinstance(small.maps, np.memmap) and not caplog.records
    assert isinstance(large.maps, np.memmap) and isinstance(large.masks, np.memmap)
    assert results_by_category(large, every) == results_by_category(small, every)
    assert np.array_equal(large.score, small.score) and not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    caplog.clear()
    assert not isinstance(score_images(Brightness(), data, OPTIONS).maps, np.memmap)
    assert "lacks room for" in caplog.text


def test_the_next_images_are_decoded_while_the_model_works():
    data, ahead = generated_set(8), threading.Event()
    drawn = data.sample
    data.sample = lambda draw: (ahead.set() if draw >= 3 else None, drawn(draw))[1]

    class Waiting(Brightness):
        def predict(self, images):
            assert ahead.wait(10)
            return super().predict(images)

    score_images(Waiting(), data, OPTIONS)


def test_batches_that_wait_are_bounded(monkeypatch):
    """No more are decoded ahead than there are threads, and one thread where a batch is large."""
    monkeypatch.setattr("datasets.loader.AHEAD", 3 * 12 * 32 * 32)
    data, seen = generated_set(30), []
    drawn = data.sample
    data.sample = lambda draw: (seen.append(draw), drawn(draw))[1]
    loader = batches(data, 3)
    assert loader.threads == 1 and len(loader) == 10
    for number, batch in enumerate(loader, start=1):
        assert batch["index"].tolist() == [3 * number - 3, 3 * number - 2, 3 * number - 1]
        assert len(seen) <= 3 * (number + 1)


def test_an_error_in_a_thread_is_the_users_own():
    data = generated_set(8)
    data.sample = lambda draw: (_ for _ in ()).throw(DatasetError("cannot read 0.png"))
    with pytest.raises(DatasetError, match=r"cannot read 0\.png"):
        score_images(Brightness(), data, OPTIONS)


def test_memory_beyond_the_maps_does_not_grow(make_config, monkeypatch):
    """Metrics of twice the images take the same memory besides the maps, masks and anomalous pixels."""
    every = dataclasses.replace(make_config().run, extra_metrics=("aupimo", "dsc_unias"))
    monkeypatch.setattr(evaluation.metrics, "CHUNK", 1 << 16)
    peaks = []
    for count in (64, 128):
        samples = [Sample(ROOT / "x.png", i % 2, None, "part", "test", "", "") for i in range(count)]
        maps = np.random.default_rng(0).random((count, 128, 128), dtype=np.float32)
        masks = np.zeros(maps.shape, np.uint8)
        masks[1::2, 3:9, 3:9] = 1
        scores = Scores(samples, maps.max((1, 2)), maps, masks, 0.0)
        tracemalloc.start()
        results_by_category(scores, every)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[0] < 2e6  # the smaller set's maps have 4 MB


def test_a_younger_setting_leaves_runs_and_checkpoints_as_they_were(make_config, tmp_path):
    config = make_config(run__device="auto")
    tree = config.to_dict()
    del tree["eval"]["every"]
    Checkpoint(config, {}, 1).save(tmp_path / "new.pt")
    old = torch.load(tmp_path / "new.pt", weights_only=True) | {"config": tree}
    torch.save(old, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt").config == load_checkpoint(tmp_path / "new.pt").config
    rounded = dataclasses.replace(config, run=dataclasses.replace(config.run, eval_precision="bf16"))
    assert config_hash(rounded) != config_hash(config)


def test_the_model_of_the_benchmark_predicts(mvtec_like, tmp_path):
    with printed_commands.modules_of(ROOT / "benchmarks"):
        import large_sets
    large_sets.write_model(tmp_path / "last.pt", mvtec_like, TINY, 64)
    assert (
        load_detector(tmp_path / "last.pt", device="cpu").predict(np.zeros((64, 64, 3), np.uint8)).score >= 0
    )
