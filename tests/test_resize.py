"""`Decode.fit_tensor`: what an exported graph does to images is what training does to files, bit by bit."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import export as export_command
from datasets.transforms import Decode, Normalise, grey_tensor
from model.base import AnomalyModel
from model.decision import Prediction

SIZES = [(1, 9), (8, 9), (32, 24), (31, 200), (97, 64), (257, 129), (64, 24)]  # height, width


def noise(size, *lead):
    """Bytes of which many are 0 or 255, where filters with negative weights go beyond the range."""
    values = np.random.default_rng(size).normal(128, 150, (*lead, *size, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop", [None, 1.0, 0.85, 0.6, 40, 101])
@pytest.mark.parametrize("size", SIZES)
def test_it_is_pillows(kind, crop, size):
    decode = Decode((32, 24), kind, crop)
    images = noise(size, 2)
    expected = np.stack([np.asarray(decode.fit(Image.fromarray(image))) for image in images])
    found = decode.fit_tensor(torch.from_numpy(images))
    assert found.dtype == torch.float64 and np.array_equal(found.movedim(1, -1).numpy(), expected)


def test_many_sizes_are_pillows():
    rng = np.random.default_rng(0)
    for kind in ("bilinear", "bicubic", "lanczos"):
        for size in rng.integers(1, 400, (30, 2)).tolist():
            decode = Decode((37, 45), kind)
            expected = np.asarray(decode.fit(Image.fromarray(noise(tuple(size)))))
            found = decode.fit_tensor(torch.from_numpy(noise(tuple(size)))).movedim(0, -1).numpy()
            assert np.array_equal(found, expected), (kind, size)


def test_grey_is_opencvs():
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    found = grey_tensor(torch.from_numpy(image).double().movedim(-1, 0)).numpy()
    assert np.array_equal(found, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


class Plain(AnomalyModel):
    """Gives the values that a model would see."""

    def predict(self, images):
        return Prediction(images[:, 0] + 256 * images[:, 1] + 65536 * images[:, 2], images.mean((1, 2, 3)))


@pytest.mark.parametrize(("kind", "crop"), [("bilinear", 0.85), ("lanczos", 101)])
@pytest.mark.slow
def test_it_is_pillows_in_onnx_runtime(kind, crop):
    pytest.importorskip("onnxruntime")
    decode = Decode((96, 80), kind, crop)
    model = export_command.Deployed(Plain(), decode, Normalise((0, 0, 0), (1 / 255,) * 3))
    exported = export_command.to_onnx(model, noise((20, 30), 2), {}, 0.01)
    for size in [*SIZES, (10, 30)]:  # 0.85 of 10 is half way between two sides
        images = noise(size, 2)
        _, found = exported.run(images)
        for image, values in zip(images, found):
            red, green, blue = np.moveaxis(np.asarray(decode.fit(Image.fromarray(image)), np.int64), -1, 0)
            assert np.array_equal(values, red + 256 * green + 65536 * blue), size
