"""export.py: the file does what PyTorch does, at any batch size, and says what a user of it must know."""

import builtins
import json
from functools import partial

import numpy as np
import pytest
import torch

import export as export_command
from datasets.build import build_test
from datasets.transforms import Normalise
from export import Exported
from model import build_model, layers
from model.backbone import input_normalisation
from utils.checkpoint import Checkpoint, load_checkpoint, restore_model
from utils.cli import run_command


@pytest.fixture
def checkpoint(make_config, mvtec_like, tmp_path):
    """Writes a checkpoint of a model that is not trained, and gives its path."""

    def write(root=mvtec_like, calibration=None, **settings):
        settings = {"run__data_root": str(root), "data__category": "part", "model__width": 0.25} | settings
        config = make_config(model__backbone="resnet18", **settings)  # few layers: exporting takes a while
        model = build_model(config)
        if config.model.name == "memory-bank":
            model.fit([torch.randn(4, 3, 64, 64)], seed=0)
        path = tmp_path / "run" / "last.pt"
        Checkpoint(config, model.state_dict(), 1, calibration=calibration).save(path)
        return path

    return write


def export(path, *flags):
    return run_command(export_command.main, ["--checkpoint", str(path), "--quiet", *flags])


def predictions(path):
    """Raw uint8 images of the run's test set, and what PyTorch makes of them."""
    state = load_checkpoint(path)
    normalise = Normalise(*input_normalisation(state.config.model.backbone))
    data, *_ = build_test(state.config, state.config, normalise)
    model = build_model(state.config, pretrained=False)
    restore_model(model, state.model, source=path)
    raw = np.stack([data.pixels(i) for i in range(5)])
    with torch.no_grad():
        return raw, model.eval().predict(data.__getitems__(list(range(5)))["image"])


RELEASED = {"model__flavor": "released", "model__mem_reparam": "parallel", "model__mem_kernels": [3, 5]}
BANK = {"model__name": "memory-bank"}


@pytest.mark.parametrize(("resize", "settings"), [
    pytest.param("lanczos", RELEASED, id="uninet", marks=pytest.mark.slow),
    pytest.param("bilinear", {"model__name": "recontrast"}, id="recontrast", marks=pytest.mark.slow),
    pytest.param("bilinear", BANK, id="memory-bank"),
    pytest.param("bilinear", BANK | {"data__tile": 48}, id="tiles", marks=pytest.mark.slow),
])  # fmt: skip
def test_onnx(checkpoint, resize, settings, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    scores = {"scores": [1.0, 2.0], "low": 0.0, "high": 1.0}
    path = checkpoint(calibration=scores, **settings)
    assert export(path) == 0
    out = capfd.readouterr().out
    assert "largest difference on 6 images" in out and "ms per image" in out
    session = onnxruntime.InferenceSession(path.parent / "model.onnx")
    raw, expected = predictions(path)
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": raw})
    np.testing.assert_allclose(score, expected.score.numpy(), rtol=1e-5)
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map.numpy(), rtol=1e-4, atol=1e-5)
    alone = session.run(["anomaly_map"], {"image": raw[:1]})[0]
    np.testing.assert_allclose(alone, anomaly_map[:1], rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["image_size"]) == [64, 64] and about["resize"].startswith(resize)
    assert json.loads(about["calibration"]) == scores


@pytest.mark.slow
def test_onnx_of_frames(checkpoint, mvtec_like):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = checkpoint(path="configs/ped2.yaml", data__name="folder")
    assert export(path, "--images", str(mvtec_like / "part/test")) == 0
    session = onnxruntime.InferenceSession(path.parent / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    size = json.loads(about["image_size"])
    frames = np.random.default_rng(0).integers(0, 256, (2, 2, *size, 3), dtype=np.uint8)
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": frames})
    assert score.shape == (2,) and anomaly_map.shape == (2, *size) and "frame" in about["input"]
    assert "calibration" not in about and json.loads(about["config"])["model"]["backbone"]


def by_pytorch(model, image, about, *, factor=1.0):
    """An export that PyTorch itself computes, with maps that are too large by `factor`."""

    def run(images):
        score, anomaly_map = model(torch.from_numpy(images))
        return score.numpy(), factor * anomaly_map.numpy()

    return Exported(b"a file", run)


def test_a_wrong_export_is_not_written(checkpoint, monkeypatch, capfd):
    path = checkpoint()
    monkeypatch.setattr(export_command, "to_onnx", partial(by_pytorch, factor=1.01))
    assert export(path) == 1
    err = capfd.readouterr().err
    assert "anomaly_map differs from PyTorch's" in err and err.count("\n") == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_what_no_onnx_file_can_hold_is_refused_at_once(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(export_command, "to_onnx", None)
    path = checkpoint(model__name="memory-bank")
    bank = load_checkpoint(path).model["bank"]
    monkeypatch.setattr("export.LARGEST_FILE", bank.numel() * bank.element_size())
    assert export(path) == 1
    err = capfd.readouterr().err
    assert "GiB, an ONNX file at most" in err and "model.bank_fraction" in err and err.count("\n") == 1


def test_a_wrongly_deployed_model_is_not_written(checkpoint, monkeypatch, capfd):
    """What is exported is deployed; it is compared with the model as it was trained."""
    real = layers.fold_batch_norms

    def wrong(module, *inputs):
        real(module, *inputs)
        for conv in (m for m in module.modules() if isinstance(m, torch.nn.Conv2d)):
            conv.weight.data *= 1.05

    monkeypatch.setattr("model.base.fold_batch_norms", wrong)
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    path = checkpoint()
    assert export(path) == 1
    assert "differs from PyTorch's" in capfd.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_images_of_the_run_are_gone(checkpoint, tmp_path, mvtec_like, monkeypatch, capfd):
    path = checkpoint(root=tmp_path / "gone")
    monkeypatch.setattr(export_command, "write_demo", lambda root: mvtec_like)
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    assert run_command(export_command.main, ["--checkpoint", str(path)]) == 0
    assert "comparing on demo images" in capfd.readouterr().err
    assert export(path, "--images", str(tmp_path / "gone")) == 1
    assert "no image at" in capfd.readouterr().err


def test_onnx_is_missing(checkpoint, monkeypatch, capfd):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnx":
            raise ImportError("no onnx", name="onnx")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert export(checkpoint()) == 1
    assert "pip install -r requirements-export.txt" in capfd.readouterr().err
