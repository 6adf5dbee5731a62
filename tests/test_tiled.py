"""Tiles: cover of an image, blending of maps, scores, training on them, a large photograph."""

import csv

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from photographs import read_photograph
from PIL import Image

import predict as predict_command
import test as test_command
import train as train_command
from datasets.transforms import augment_batch, random_tile
from model import build_model
from model.base import AnomalyModel
from model.decision import Prediction
from model.tiles import tile_starts, tile_window, tiled
from utils.checkpoint import load_checkpoint
from utils.cli import run_command
from utils.errors import ConfigError


class Mirror(AnomalyModel):
    """A model whose map is its input's first channel; the score is the map's maximum."""

    def predict(self, images):
        return Prediction(images[:, 0], images[:, 0].amax(dim=(1, 2)))


class Constant(AnomalyModel):
    """Maps that are 1 for a tile with anything in it, else 0."""

    def predict(self, images):
        score = (images[:, 0].amax(dim=(1, 2)) > 0).float()
        return Prediction(score[:, None, None].expand(-1, *images.shape[2:]), score)


class TestCover:
    @pytest.mark.parametrize("overlap", [0, 0.1, 0.25, 0.5, 0.75])
    @pytest.mark.parametrize("length", [64, 65, 97, 100, 127, 128, 333])
    def test_every_pixel_with_the_overlap_asked_for(self, length, overlap):
        starts = tile_starts(length, 64, overlap)
        assert starts[0] == 0 and starts[-1] == length - 64 and starts == sorted(set(starts))
        steps = np.diff(starts)
        assert (steps <= 64 * (1 - overlap) + 1).all()  # rounding moves a tile by less than a pixel
        fewer = len(starts) - 2
        assert fewer < 1 or (length - 64) / fewer > 64 * (1 - overlap)  # as few as that takes

    def test_by_hand(self):
        assert tile_starts(64, 64, 0.25) == [0]
        assert tile_starts(128, 64, 0) == [0, 64]
        assert tile_starts(160, 64, 0.25) == [0, 48, 96]

    def test_window(self):
        window = tile_window(32)
        assert window.shape == (32, 32) and (window > 0).all()
        assert window.max() > 0.98 and window[0].max() < 0.01 and torch.allclose(window, window.flip(0).T)


class TestBlending:
    @pytest.mark.parametrize("size", [(64, 64), (65, 131), (200, 97), (128, 128)])
    @pytest.mark.parametrize("batch_size", [1, 5, 64])
    def test_known_answer(self, size, batch_size):
        """What every tile says alike comes out unchanged: weights sum up to one, each pixel is covered."""
        images = torch.randn(3, 3, *size)
        found = tiled(Mirror(), tile=64, overlap=0.25, batch_size=batch_size).predict(images)
        assert torch.allclose(found.anomaly_map, images[:, 0], atol=1e-6)
        assert torch.equal(found.score, images[:, 0].amax(dim=(1, 2)))  # of each image's own tiles

    def test_no_seams(self):
        """Where tiles disagree most (0 and 1), the map goes over in small steps."""
        images = torch.zeros(1, 3, 128, 224)
        images[0, :, 60, 10] = 1  # in the first column of tiles alone
        fine = tiled(Constant(), tile=128, overlap=0.25, batch_size=4).predict(images).anomaly_map[0]
        hard = (
            tiled(Constant(), tile=128, overlap=0.0, batch_size=4).predict(images[..., :256]).anomaly_map[0]
        )
        assert fine[:, :90].min() > 0.999 and fine[:, 130:].max() < 1e-3
        assert fine.diff(dim=1).abs().max() < 0.1 and hard.diff(dim=1).abs().max() < 0.1
        edge = (
            tiled(Constant(), tile=112, overlap=0.0, batch_size=4).predict(images[..., :112, :]).anomaly_map
        )
        assert edge.diff(dim=2).abs().max() == 1  # without overlap there is a seam

    @pytest.mark.parametrize("name", ["uninet", "memory-bank", pytest.param("unias", marks=pytest.mark.slow)])
    def test_one_tile_is_the_model_itself(self, make_config, name):
        images = torch.randn(2, 3, 64, 64)
        whole = build_model(make_config(model__name=name)).eval()
        tiled = build_model(make_config(model__name=name, data__tile=64)).eval()
        tiled.load_state_dict(whole.state_dict())
        if name == "memory-bank":
            normal = torch.randn(2, 3, 64, 64)
            whole.fit([normal], seed=0)
            tiled.fit([normal], seed=0)
            assert torch.allclose(tiled.state_dict()["bank"], whole.bank, atol=1e-3)
        with torch.inference_mode():
            expected, found = whole.predict(images), tiled.deploy().predict(images)
        assert torch.allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4)
        assert torch.allclose(found.score, expected.score, atol=1e-4)

    def test_image_by_image(self, make_config):
        """The result of an image does not depend on what it is predicted with, nor on the batch size."""
        images = torch.randn(3, 3, 96, 128)
        model = build_model(make_config(data__image_size=(96, 128), data__tile=64)).eval().deploy()
        with torch.inference_mode():
            together, alone = model.predict(images), model.predict(images[1:2])
        assert torch.allclose(together.anomaly_map[1], alone.anomaly_map[0], atol=1e-5)
        assert torch.allclose(together.score[1], alone.score[0], atol=1e-5)


class TestTraining:
    def batch(self, count=4, size=(40, 56)):
        image = torch.arange(count * size[0] * size[1]).float().view(count, 1, *size).expand(-1, 3, -1, -1)
        mask = torch.zeros(count, 1, *size, dtype=torch.uint8)
        mask[:, :, :8, :8] = 1
        return {"image": image, "mask": mask, "label": torch.tensor([0, 1, 1, 1][:count])}

    def test_image_and_mask_alike(self):
        batch = self.batch()
        batch["image"] = batch["mask"].float().expand(-1, 3, -1, -1)
        seen = set()
        for step in range(30):
            tile = random_tile(batch, 32, np.random.default_rng(step))
            assert tile["image"].shape == (4, 3, 32, 32) and tile["mask"].dtype == torch.uint8
            assert torch.equal(tile["image"][:, :1], tile["mask"].float())
            inside = tile["mask"].flatten(1).any(dim=1)
            assert torch.equal(tile["label"], inside * batch["label"])  # labels of the tiles
            seen |= set(tile["label"].tolist())
        assert seen == {0, 1}

    def test_every_place_is_drawn(self):
        image = self.batch(1)["image"]
        first = [random_tile({"image": image}, 32, np.random.default_rng(s))["image"][0, 0, 0, 0].item()
                 for s in range(2000)]  # fmt: skip
        rows, columns = np.divmod(np.array(first, int), 56)
        assert set(rows) == set(range(9)) and set(columns) == set(range(25))

    def test_a_function_of_seed_and_step(self, make_config):
        config = make_config(data__image_size=(64, 96), data__tile=64, train__scales=[1.0, 0.5])
        batch = self.batch(size=(64, 96))
        tiles = [augment_batch(batch, config, step)["image"] for step in range(4)]
        assert torch.equal(tiles[2], augment_batch(batch, config, 2)["image"])
        assert not torch.equal(tiles[0], tiles[2]) and tiles[1].shape[2:] == (32, 32)  # same tile, other size
        assert torch.allclose(tiles[1].mean(), tiles[0].mean(), rtol=1e-3)

    @pytest.mark.slow
    def test_commands_and_exact_resume(self, mvtec_like, tmp_path, capfd):
        flags = [
            "--config", "configs/mvtec.yaml", "--data-root", str(mvtec_like), "--category", "part",
            "--output", str(tmp_path), "--backbone", TINY, "--precision", "fp32",
            "--device", "cpu", "--quiet", "--tile", "64", "--set", "data.image_size=[96,64]",
            "--weights", "random", "--set", "model.width=0.5", "--set", "train.batch_size=4",
            "--save-every", "2", "--iterations", "4",
        ]  # fmt: skip
        assert run_command(train_command.main, [*flags, "--name", "whole"]) == 0
        saved = train_command.Run.save

        def stop(*args, **fields):
            saved(*args, **fields)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_command.Run, "save", stop)
            assert run_command(train_command.main, [*flags, "--iterations", "4", "--name", "broken"]) == 1
        assert (
            run_command(train_command.main, [*flags, "--iterations", "4", "--name", "broken", "--resume"])
            == 0
        )
        folder = tmp_path / "mvtec/one-class/part"
        a, b = (load_checkpoint(folder / name / "last.pt") for name in ("whole", "broken"))
        assert a.config.data.tile == 64 and all(torch.equal(a.model[k], b.model[k]) for k in a.model)
        again = ["--checkpoint", str(folder / "whole"), "--device", "cpu", "--quiet"]
        assert run_command(test_command.main, [*again, "--protocol", "april-2025"]) == 0
        ours, theirs = (
            list(csv.DictReader((folder / p / "scores.csv").open())) for p in ("whole", "whole/test")
        )
        for x, y in zip(ours, theirs):
            assert float(x["score"]) == pytest.approx(float(y["score"]), rel=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data__tile": 128}, "larger than data.image_size"),
        ({"data__tile": 48}, "data.tile 48 must be multiples of 32"),
        ({"data__tile": 16}, "allowed are 32 to 4096"),
        ({"data__tile": 64, "model__head": "label", "loss__supervised": "bce"}, "judges whole images"),
    ],
)
def test_settings_that_do_not_go_together(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


def test_image_size_is_free_with_tiles(make_config):
    assert make_config(data__image_size=(101, 75), data__tile=64).data.image_size == (101, 75)


# --- a large photograph -------------------------------------------------------------------------------------


def scratched(image: np.ndarray) -> np.ndarray:
    """A fine scratch, 60 pixels long: a bright and a dark edge, two pixels each, which average to nothing."""
    changed = image.astype(int)
    for i in range(60):
        x = 500 + i // 3
        changed[480 + i, x : x + 2] += 40
        changed[480 + i, x + 2 : x + 4] -= 40
    return np.clip(changed, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_a_small_defect_on_a_large_photograph(tmp_path, capfd):
    """1024 x 1024: lost when the image is resized to 128, found in tiles."""
    photograph = cv2.resize(read_photograph("brick.png"), None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    train, new = photograph[:, :1024], photograph[:, 1024:]
    pictures = {
        "part/train/good/0.png": train[:1024], "part/train/good/1.png": train[1024:],
        "new/0.png": new[:1024], "new/1.png": new[1024:], "new/scratch.png": scratched(new[512:1536]),
    }  # fmt: skip
    for name, picture in pictures.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(tmp_path / name, compress_level=1)

    def most_anomalous(name, *flags):
        flags = [
            "--config", str(ROOT / "configs/folder.yaml"), "--data-root", str(tmp_path), "--output",
            str(tmp_path / "runs"), "--name", name, "--model", "memory-bank", "--category", "part",
            "--precision", "fp32", "--device", "cpu", "--quiet",
            "--set", "data.calibration_fraction=0", *flags,
        ]  # fmt: skip
        assert run_command(train_command.main, flags) == 0
        run = tmp_path / "runs/folder/one-class/part" / name
        argv = ["--checkpoint", str(run), "--device", "cpu", "--quiet", "--output", str(tmp_path / name)]
        assert run_command(predict_command.main, [*argv, str(tmp_path / "new")]) == 0
        rows = list(csv.DictReader((tmp_path / name / "scores.csv").open()))
        return max(rows, key=lambda row: float(row["score"]))["path"]

    small = ("--set", "data.image_size=128", "--set", "model.bank_fraction=1")
    tiles = ("--set", "data.image_size=1024", "--tile", "448", "--set", "model.bank_fraction=0.02")
    assert most_anomalous("resized", *small) != "scratch.png"
    assert most_anomalous("tiles", *tiles) == "scratch.png"
