"""`load_detector` from Python: what predict.py writes, and one line for what is no image."""

import csv
import subprocess
import sys
import threading

import cv2
import numpy as np
import pytest
import tifffile
import torch
from conftest import ROOT, write_mvtec_like
from PIL import Image

import predict as predict_command
from datasets.images import read_image, to_rgb
from datasets.transforms import Decode
from model import build_model, load_detector
from utils.checkpoint import Checkpoint
from utils.cli import run_command
from utils.errors import ConfigError

IN_PYTHON = """
import csv, sys
from pathlib import Path
import numpy as np
from PIL import Image
from model import load_detector
run, folder, out = map(Path, sys.argv[1:])
rows = {r["path"]: r for r in csv.DictReader((out / "scores.csv").open())}
paths = sorted(p for p in folder.iterdir())
names = [p.name for p in paths]
detector = load_detector(run, device="cpu")
by_path = detector.predict(paths, false_alarm_rate=0.2)
opened = [Image.open(p) for p in paths if p.suffix != ".tiff"]  # Pillow reads colours of 16 bits otherwise
by_image = detector.predict(opened, false_alarm_rate=0.2)
arrays = {n: np.asarray(Image.open(folder / n)) for n in ("rgb.png", "large.jpg")}
by_array = detector.predict(list(arrays.values()), false_alarm_rate=0.2)
alone = detector.predict(str(folder / "turned.jpg"), false_alarm_rate=0.2)
found = [*zip(names, by_path), *zip([Path(o.filename).name for o in opened], by_image)]
found += [*zip(arrays, by_array), ("turned.jpg", alone)]
maps = {p.name.removesuffix(".tiff"): np.asarray(Image.open(p)) for p in (out / "maps").iterdir()}
for name, r in found:
    row, written = rows[name], maps.get(name, maps.get(Path(name).stem))
    assert f"{r.score:.4g}" == f"{float(row['score']):.4g}", (name, r.score, row)
    assert f"{r.p_value:.6g}" == row["p_value"] and r.is_anomalous == (row["is_anomalous"] == "1")
    assert r.anomaly_map.dtype == np.float32 and r.anomaly_map.shape == written.shape, name
    assert np.allclose(r.anomaly_map, written, rtol=1e-4, atol=1e-5), name
print(len(rows), len(found))
"""


def write_ten(folder):
    """Ten pictures of different sizes and modes."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def stripes(height, width, channels=3):
        wave = 90 + 40 * np.sin(np.arange(width) / 3)[None, :, None]
        return (wave + rng.normal(0, 4, (height, width, channels))).clip(0, 255).astype(np.uint8)

    rgb = Image.fromarray(stripes(48, 40))
    rgb.save(folder / "rgb.png")
    Image.fromarray(stripes(130, 90)).save(folder / "large.jpg")
    Image.fromarray(stripes(33, 57)[..., 0]).save(folder / "grey.bmp")
    Image.fromarray(stripes(50, 41, 4), "RGBA").save(folder / "alpha.png")
    Image.fromarray(stripes(64, 64)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(stripes(40, 60)).convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(stripes(36, 70)).save(folder / "turned.jpg", exif=exif)
    cv2.imwrite(str(folder / "deep.png"), stripes(45, 46)[..., 0].astype(np.uint16) * 257)
    tifffile.imwrite(folder / "deep.tiff", stripes(47, 39).astype(np.uint16) * 257, photometric="rgb")
    spot = stripes(48, 44)
    spot[10:20, 10:20] = 250
    Image.fromarray(spot).save(folder / "spot.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a fitted memory bank with a calibration of five images."""
    import train as train_command

    folder = tmp_path_factory.mktemp("detector")
    data = write_mvtec_like(folder / "data")
    flags = [
        "--config", "configs/folder.yaml", "--data-root", str(data), "--category", "part", "--name", "r",
        "--output", str(folder / "runs"), "--model", "memory-bank", "--precision", "fp32", "--device", "cpu",
        "--quiet", "--set", "data.image_size=64", "--set", "data.calibration_fraction=0.4",
    ]  # fmt: skip
    assert run_command(train_command.main, flags) == 0
    return folder / "runs/folder/one-class/part/r"


@pytest.mark.slow
def test_a_clean_python_gives_what_predict_writes(run, tmp_path):
    images, out = write_ten(tmp_path / "images"), tmp_path / "out"
    flags = ["--output", str(out), "--save", "map", "--false-alarm-rate", "0.2", "--device", "cpu", "--quiet"]
    assert run_command(predict_command.main, ["--checkpoint", str(run), str(images), *flags]) == 0
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert "1" in {r["is_anomalous"] for r in rows if r["path"] == "spot.png"}
    command = [sys.executable, "-c", IN_PYTHON, str(run), str(images), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10", "22"]


def test_what_is_no_image_is_said_in_one_line(run, tmp_path):
    detector = load_detector(run, device="cpu")
    good = np.full((20, 20, 3), 90, np.uint8)
    for wrong, reason in (
        (good / 255, "an array (20, 20, 3) of float64"),
        (good[..., 0], "an array (20, 20) of uint8"),
        (good[None], "an array (1, 20, 20, 3) of uint8"),
        (good[:0], "it has 20 x 0 pixels"),
        (np.zeros((0, 0, 3), np.uint8), "it has 0 x 0 pixels"),
        (good[:5], "it has 20 x 5 pixels"),
        (torch.zeros(3, 20, 20), "it is a Tensor"),
        (None, "it is a NoneType"),
        (Image.fromarray(np.full((20, 20), 7.0, np.float32)), "must be in [0, 1], found 7 to 7"),
        (Image.new("RGBA", (20, 20)), "transparent everywhere"),
    ):
        with pytest.raises(ValueError, match=r"images\[1\] is no readable image") as caught:
            detector.predict([good, wrong])
        assert reason in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "a.png").write_bytes(b"GIF8")
    with pytest.raises(ValueError, match=r"a\.png is no readable image.*a GIF"):
        detector.predict(tmp_path / "a.png")
    with pytest.raises(ValueError, match="between 0 and 1"):
        detector.predict(good, false_alarm_rate=0)
    assert detector.predict([]) == []


@pytest.mark.parametrize("size", [0, -1])
def test_batches_hold_an_image(run, size):
    with pytest.raises(ConfigError, match=f"--eval-batch-size is {size}; it is at least 1"):
        load_detector(run, device="cpu", batch_size=size)


def test_pictures_in_memory_are_decoded_as_files_are(tmp_path):
    for path in write_ten(tmp_path / "images").iterdir():
        if path.suffix != ".tiff":
            assert np.array_equal(to_rgb(Image.open(path)), read_image(path)), path
    shares = Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20))
    assert np.asarray(to_rgb(shares)).max() == 255


class TestMapsOfTheImagesOwnSize:
    def test_without_crop(self):
        decode = Decode((16, 8))
        ramp = np.repeat(np.arange(16, dtype=np.float32)[:, None], 8, axis=1)
        large = decode.to_image(ramp, 24, 64)
        assert large.shape == (64, 24) and large.dtype == np.float32 and large.flags.writeable
        np.testing.assert_allclose(large[2:-2, 5], (np.arange(64)[2:-2] + 0.5) / 4 - 0.5, rtol=1e-5)
        small = decode.to_image(ramp, 3, 4)
        assert small.shape == (4, 3) and np.allclose(small[1:3, 0], [5.5, 9.5], atol=0.1)

    @pytest.mark.parametrize("crop", [10, 0.5, 30])
    def test_a_crop_is_put_back_in_its_place(self, tmp_path, crop):
        image = np.zeros((20, 24, 3), np.uint8)
        image[8:10, 13:15] = 200
        decode = Decode((60, 60), center_crop=crop)
        seen = np.asarray(decode.fit(Image.fromarray(image)))[..., 0].astype(np.float32)
        whole = decode.to_image(seen + 1, 24, 20)
        assert whole.shape == (20, 24) and whole.min() == 1
        ys, xs = np.nonzero(whole > 100)
        assert (ys.min(), ys.max(), xs.min(), xs.max()) == (8, 9, 13, 14)


def test_threads_take_turns(run):
    detector, found = load_detector(run, device="cpu", batch_size=2), {}
    images = [np.random.default_rng(i).integers(0, 256, (40, 30 + i, 3), np.uint8) for i in range(6)]

    def score(name):
        found[name] = [r.score for r in detector.predict(images)]

    threads = [threading.Thread(target=score, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2] == [r.score for r in detector.predict(images)]


@pytest.fixture
def untrained(make_config, tmp_path):
    """Writes a checkpoint of a model as it begins."""

    def write(**settings):
        config = make_config(**settings)
        path = tmp_path / "run/last.pt"
        Checkpoint(config, build_model(config).state_dict(), config.train.iterations).save(path)
        return path

    return write


def test_tiles_and_no_calibration(untrained):
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    path = untrained(data__image_size=96, data__tile=64, model__width=0.25)
    found = load_detector(path, device="cpu").predict(image)
    assert found.anomaly_map.shape == (70, 90) and found.p_value is None and found.is_anomalous is None


@pytest.mark.parametrize(
    "settings", [{"path": "configs/ped2.yaml"}, {"data__name": "ped2", "data__stack_frames": 2}]
)
def test_a_model_of_frames_is_refused(untrained, settings):
    detector = load_detector(untrained(**settings), device="cpu")
    with pytest.raises(ConfigError, match=r"several frames of a video.*predict\.py or test\.py"):
        detector.predict(np.zeros((20, 20, 3), np.uint8))
