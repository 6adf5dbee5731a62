"""export.py: the file does what PyTorch does with images of any size, decides, and says what it is."""

import builtins
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_mvtec_like
from PIL import Image

import export as export_command
import predict as predict_command
import test as test_command
from datasets.build import build_test
from datasets.images import UnreadableImageError, read_image
from datasets.transforms import Decode
from evaluation.published_protocol import april_detector
from export import Exported
from model import build_model, exported, layers, load_detector
from model.exported import ExportedModel, contents
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import run_command

EXAMPLE = ROOT / "examples/onnx_predict.py"


def write_checkpoint(make_config, file, root, calibration=None, **settings):
    """A model that is not trained."""
    settings = {"run__data_root": str(root), "data__category": "part", "model__width": 0.25} | settings
    config = make_config(**{"model__backbone": "resnet18"} | settings)  # few layers: exporting takes a while
    torch.manual_seed(0)  # a fixture of the module is made before conftest's seed
    model = build_model(config)
    if model.fits or config.model.name == "memory-bank":
        model.fit([torch.randn(4, 3, 64, 64)], seed=0)
    Checkpoint(config, model.state_dict(), 1, calibration=calibration).save(file)
    return file


@pytest.fixture
def checkpoint(make_config, mvtec_like, tmp_path):
    """Writes a checkpoint of a model that is not trained, and gives its path."""

    def write(root=mvtec_like, calibration=None, **settings):
        return write_checkpoint(make_config, tmp_path / "run/last.pt", root, calibration, **settings)

    return write


def export(path, *flags):
    return run_command(export_command.main, ["--checkpoint", str(path), "--quiet", *flags])


def pictures(path):
    """Test images of the run, all of one size."""
    config = load_checkpoint(path).config
    data, *_ = build_test(config, config, load_detector(path, device="cpu").normalise)
    return [read_image(sample.path) for sample in data.samples[:5]]


def arrays(images, size=None):
    return np.stack([np.asarray(image.resize(size) if size else image) for image in images])


def by_training(path, raw):
    """What PyTorch says of raw images that are decoded as in training."""
    detector = load_detector(path, device="cpu", precision="fp32")
    data, *_ = build_test(detector.config, detector.config, detector.normalise)
    fitted = np.stack([np.asarray(data.decode.fit(Image.fromarray(image))) for image in raw])
    with torch.no_grad():
        return detector.model.predict(data.normalise(fitted))


RELEASED = {"model__flavor": "released", "model__mem_reparam": "parallel", "model__mem_kernels": [3, 5]}
BANK = {"model__name": "memory-bank"}
VIT = {"model__backbone": "test_vit", "model__strides": [16, 16, 16]}  # levels of one stride
ADAPTED = {"model__name": "remind", "model__bank_fraction": 0, "loss__terms": ["adapt"]}
HALF = np.array(0.5, np.float32)


@pytest.fixture(scope="module")
def bank(make_config, tmp_path_factory):
    """The checkpoint of an exported memory bank; held-out scores lie between those of its test images."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("bank")
    root = write_mvtec_like(folder / "data")
    path = write_checkpoint(make_config, folder / "run/last.pt", root, data__center_crop=0.9, **BANK)
    scores = np.sort(by_training(path, arrays(pictures(path))).score.numpy().astype(float))
    calibration = {"scores": ((scores[1:] + scores[:-1]) / 2).tolist(), "low": 0.0, "high": 1.0}
    replace(load_checkpoint(path), calibration=calibration).save(path)
    assert export(path, "--false-alarm-rate", "0.3") == 0
    return path


@pytest.fixture(scope="module")
def session(bank):
    import onnxruntime

    return onnxruntime.InferenceSession(bank.with_name("model.onnx"))


def check_as_trained(session, path, raw):
    expected = by_training(path, raw)
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": raw})
    np.testing.assert_allclose(score, expected.score.numpy(), rtol=1e-5)
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [None, (30, 21), (64, 64), (203, 150)])
@pytest.mark.slow
def test_images_of_any_size_in_any_number(bank, session, size):
    images = pictures(bank)
    for count in (1, 5):
        check_as_trained(session, bank, arrays(images[:count], size))


@pytest.mark.slow
def test_the_file_decides(bank, session):
    raw = arrays(pictures(bank))
    scores = np.array(load_checkpoint(bank).calibration["scores"])
    score, p_value, flag = session.run(["score", "p_value", "is_anomalous"], {"image": raw})
    expected = (1 + (scores >= score[:, None]).sum(1)) / (1 + len(scores))
    assert len(set(expected)) == 5
    np.testing.assert_allclose(p_value, expected, rtol=1e-6)
    assert flag.tolist() == (expected <= 0.3).tolist() and flag.sum() == 1
    (flag,) = session.run(["is_anomalous"], {"image": raw, "rate": HALF})
    assert flag.tolist() == (expected <= 0.5).tolist() and flag.sum() == 2


@pytest.mark.slow
def test_metadata(bank, session):
    about = session.get_modelmeta().custom_metadata_map
    known = load_checkpoint(bank)
    assert about["format_version"] == "1" and about["backbone"] == "resnet18"
    assert json.loads(about["image_size"]) == [64, 64] and about["resize"].startswith("bilinear")
    assert json.loads(about["center_crop"]) == 0.9 and about["category"] == "part"
    assert json.loads(about["held_out_scores"]) == known.calibration["scores"]
    assert json.loads(about["colour_scale"]) == [0.0, 1.0] and about["false_alarm_rate"] == "0.3"
    assert json.loads(about["score"])["decision"] == known.config.score.decision
    assert json.loads(about["config"])["model"]["name"] == about["model"] == "memory-bank"
    assert set(about) >= {"input", "output", "decision", "training", "commit", "dataset"}
    assert [x.name for x in session.get_overridable_initializers()] == ["rate"]


BLOCKED = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "cv2", "scipy", "sklearn", "skimage", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_example(folder, *words):
    """The example in a Python that finds neither PyTorch nor the repository."""
    words = [sys.executable, "-I", "-c", BLOCKED, EXAMPLE, *words]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def new_images(folder):
    """Images of several sizes and kinds, and a file that is left alone."""
    rng = np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)

    def noise(*shape, high=255):
        return rng.integers(0, high, shape, dtype=np.uint8 if high < 256 else np.uint16)

    Image.fromarray(noise(50, 70, 3)).save(folder / "b.png")
    Image.fromarray(noise(64, 64)).save(folder / "below/grey.bmp")
    Image.fromarray(noise(40, 40, high=65535)).save(folder / "deep.png")
    Image.fromarray(noise(30, 33, 4)).save(folder / "alpha.png")
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(noise(90, 60, 3)).save(folder / "turned.JPG", exif=turned)
    Image.fromarray(noise(9, 9, 3)).save(folder / ".hidden.png")
    (folder / "note.txt").write_text("no image")
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("rate", [None, "0.5"])
@pytest.mark.slow
def test_the_example_writes_what_predict_does(bank, tmp_path, rate):
    images, flags = new_images(tmp_path / "new"), ["--false-alarm-rate", rate or "0.3"]
    done = run_example(tmp_path, bank.with_name("model.onnx"), images, *flags * bool(rate))
    assert done.returncode == 0 and done.stderr == ""
    flags += ["--device", "cpu", "--quiet", "--save", "none", "--output", str(tmp_path / "out")]
    assert run_command(predict_command.main, ["--checkpoint", str(bank), str(images), *flags]) == 0
    found, expected = table(tmp_path / "scores.csv"), table(tmp_path / "out/scores.csv")
    assert len(expected) == 6 and found[0] == expected[0]
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours[:4] + ours[5:] == theirs[:4] + theirs[5:]
        assert float(ours[4]) == pytest.approx(float(theirs[4]), rel=1e-4)


@pytest.mark.parametrize(("rate", "content", "said"), [
    ("1.5", None, "--false-alarm-rate is between 0 and 1"), ("0.5", b"no image", "new.png: cannot identify"),
    ("0.5", b"\x89PNG\r\n\x1a\n damaged", "new.png: "), ("0.5", None, "new.png"),
])  # fmt: skip
@pytest.mark.slow
def test_the_example_refuses_in_one_line(bank, tmp_path, rate, content, said):
    if content:
        (tmp_path / "new.png").write_bytes(content)
    done = run_example(tmp_path, bank.with_name("model.onnx"), "new.png", "--false-alarm-rate", rate)
    assert done.returncode == 1 and not (tmp_path / "scores.csv").exists()
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_the_example_is_short_and_needs_three_packages():
    lines = EXAMPLE.read_text().splitlines()
    modules = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert len(lines) <= 70 and modules - set(sys.stdlib_module_names) == {"numpy", "PIL", "onnxruntime"}


@pytest.fixture
def example():
    pytest.importorskip("onnxruntime")
    spec = importlib.util.spec_from_file_location("onnx_predict", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_keeps_a_file_that_is_there(example, tmp_path):
    (tmp_path / "mine.csv").write_text("kept")
    with pytest.raises(SystemExit, match=r"mine.csv is there already; choose another --output"):
        example.main(["model.onnx", str(tmp_path), "--output", str(tmp_path / "mine.csv")])
    assert (tmp_path / "mine.csv").read_text() == "kept"


@pytest.mark.parametrize(("words", "said"), [
    (["none.onnx", "."], "none.onnx is no file of export.py that opens"),
    (["last.pt", "."], "last.pt is no file of export.py that opens"),
    (["model.onnx", ".", "--output", "none/x.csv"], "none/x.csv has no folder; choose another --output"),
])  # fmt: skip
def test_the_example_refuses_files_before_it_scores(example, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 a checkpoint")
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        example.main(words)


def test_the_example_keeps_what_it_has_scored(example, tmp_path, monkeypatch):
    """A name whose bytes are no text, and what Pillow says of a picture that is too large."""

    class Session:
        def __init__(self, *_, **__):
            pass

        def get_modelmeta(self):
            return SimpleNamespace(custom_metadata_map={"format_version": "1", "category": "part"})

        def get_inputs(self):
            return [SimpleNamespace(shape=(1, 2, 3, 4))]

        def get_outputs(self):
            return [SimpleNamespace(name="score")]

        def run(self, *_):
            return [np.ones(1, np.float32)]

    monkeypatch.setattr(example.onnxruntime, "InferenceSession", Session)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    for name in (b"new/a.png", b"new/\xff.png"):
        Image.new("RGB", (9, 9)).save(os.fsdecode(name))
    example.main(["model.onnx", "new"])
    assert [row[0] for row in table(tmp_path / "scores.csv")[1:]] == ["a.png", "\\udcff.png"]
    Image.new("RGB", (9, 7)).save(tmp_path / "small.png")
    for name, said in (("small.png", "below 8 pixels"), ("new/a.png", "exceeds limit")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 if name == "small.png" else 40)
        with pytest.raises(SystemExit, match=f"error: {name}: .*{said}"):
            example.main(["model.onnx", name, "--output", "other.csv"])


def test_the_example_refuses_what_predict_does(example, tmp_path):
    """A JPEG whose second half is zeros, several pages, nothing but transparency."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    half = len(whole) // 2
    (tmp_path / "cut.jpg").write_bytes(whole[:half] + bytes(len(whole) - half))
    noise.save(tmp_path / "pages.tif", save_all=True, append_images=[noise])
    noise.putalpha(0)
    noise.save(tmp_path / "clear.png")
    assert np.array_equal(example.read_image(tmp_path / "whole.jpg")[0], read_image(tmp_path / "whole.jpg"))
    for name, reason in (
        ("cut.jpg", "end is missing"),
        ("pages.tif", "several"),
        ("clear.png", "transparent"),
    ):
        with pytest.raises(ValueError, match=reason):
            example.read_image(tmp_path / name)
        with pytest.raises(UnreadableImageError, match=reason):
            read_image(tmp_path / name)


@pytest.fixture(scope="module")
def paper(make_config, tmp_path_factory):
    """UniNet's exported checkpoint, the paper's variant, and what export.py printed; not to be changed."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("paper")
    path = write_checkpoint(make_config, folder / "run/last.pt", write_mvtec_like(folder / "data"))
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert export(path) == 0
    return path, printed.getvalue()


def check_export(path, printed, resize, tmp_path):
    """The file of a checkpoint without held-out scores, and the example with it."""
    import onnxruntime

    assert "largest difference on 12 images of 3 sizes" in printed
    assert "ms for one image of 40 x 48" in printed
    session = onnxruntime.InferenceSession(path.parent / "model.onnx")
    for size in (None, (131, 90)):
        check_as_trained(session, path, arrays(pictures(path), size))
    about = session.get_modelmeta().custom_metadata_map
    assert about["resize"].startswith(resize) and "held_out_scores" not in about
    assert [x.name for x in session.get_outputs()] == ["score", "anomaly_map"]
    images = new_images(tmp_path / "new")
    done = run_example(tmp_path, path.with_name("model.onnx"), images, "--false-alarm-rate", "0.5")
    assert done.returncode == 1 and "with held-out scores" in done.stderr.splitlines()[-1]
    assert run_example(tmp_path, path.with_name("model.onnx"), images).returncode == 0
    assert len(table(tmp_path / "scores.csv")) == 6 and len(table(tmp_path / "scores.csv")[1]) == 5


@pytest.mark.slow
def test_onnx_of_the_paper(paper, tmp_path):
    check_export(*paper, "bilinear", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("resize", "settings"), [
    pytest.param("lanczos", RELEASED, id="released"),
    pytest.param("bilinear", ADAPTED | VIT, id="remind-vit"),
    pytest.param("bilinear", {"model__name": "remind"}, id="remind-bank"),
    pytest.param("bilinear", {"model__name": "recontrast"}, id="recontrast"),
    pytest.param("bilinear", BANK | {"data__tile": 48}, id="tiles"),
])  # fmt: skip
def test_onnx(checkpoint, resize, settings, tmp_path, capfd):
    pytest.importorskip("onnxruntime")
    path = checkpoint(**settings)
    assert export(path) == 0
    check_export(path, capfd.readouterr().out, resize, tmp_path)


@pytest.mark.slow
def test_onnx_of_frames(checkpoint, mvtec_like, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = checkpoint(path="configs/ped2.yaml", data__name="folder")
    assert export(path, "--images", str(mvtec_like / "part/test")) == 0
    session = onnxruntime.InferenceSession(path.parent / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    size = json.loads(about["image_size"])
    frames = np.random.default_rng(0).integers(0, 256, (2, 2, 70, 81, 3), dtype=np.uint8)
    score, anomaly_map = session.run(["score", "anomaly_map"], {"image": frames})
    assert score.shape == (2,) and anomaly_map.shape == (2, *size) and "frame" in about["input"]
    assert "held_out_scores" not in about and json.loads(about["config"])["model"]["backbone"]
    done = run_example(tmp_path, path.with_name("model.onnx"), mvtec_like)
    assert done.returncode == 1 and "no model of single images" in done.stderr


@pytest.mark.slow
def test_a_cpu_predicts_with_the_file(paper, mvtec_like, tmp_path):
    """load_detector, and predict.py with it: the same maps as PyTorch's, to 1e-4 of their range."""
    path = shutil.copytree(paper[0].parent, tmp_path / "run") / "last.pt"
    file = path.with_name("model.onnx").rename(tmp_path / "put aside.onnx")
    replace(load_checkpoint(path), calibration=CALIBRATION).save(path)
    images = pictures(path)
    plain = load_detector(path, device="cpu").predict(images)
    file.rename(path.with_name("model.onnx"))
    detector = load_detector(path, device="cpu")
    found = detector.predict(images)
    assert isinstance(detector.deployed, ExportedModel)
    maps, expected = (np.stack([x.anomaly_map for x in each]) for each in (found, plain))
    scores, scores_expected = (np.array([x.score for x in each]) for each in (found, plain))
    assert 0 < np.abs(maps - expected).max() <= 1e-4 * np.ptp(expected)  # another library rounds otherwise
    np.testing.assert_allclose(scores, scores_expected, rtol=1e-4)
    words = ["--checkpoint", str(path), str(mvtec_like / "part/test"), "--output", str(tmp_path / "out")]
    assert run_command(predict_command.main, [*words, "--device", "cpu", "--save", "none", "--quiet"]) == 0
    head, *rows = table(tmp_path / "out/scores.csv")
    written = [float(row[head.index("score")]) for row in rows]
    assert all(np.isclose(score, written, rtol=1e-5).any() for score in scores)
    # other weights, and settings, than the file's: PyTorch, in all digits
    other = load_detector(
        path, device="cpu", change=lambda c: replace(c, score=replace(c.score, map_sigma=1.0))
    )
    assert not isinstance(other.deployed, ExportedModel)
    state = load_checkpoint(path)
    weights = {k: 2 * v if v.is_floating_point() else v for k, v in state.model.items()}
    replace(state, model=weights).save(path)
    assert not isinstance(load_detector(path, device="cpu").deployed, ExportedModel)


class Session:
    """An opened file of `model` and `config`."""

    def __init__(self, model, config):
        self.about = contents(model, config)

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map=self.about | {"commit": "abc"})


@pytest.mark.parametrize(
    ("settings", "precision", "used"),
    [
        ({}, "fp32", True),
        ({}, "bf16", False),
        ({"data__center_crop": 0.9}, "fp32", False),
        ({"data__stack_frames": 1}, "fp32", False),
    ],
)
def test_when_a_file_is_used(checkpoint, monkeypatch, settings, precision, used):
    """Where it computes the same from what the loader gives."""
    path = checkpoint(**BANK, **settings)
    path.with_name("model.onnx").write_bytes(b"")
    detector = load_detector(path, device="cpu", precision=precision)
    monkeypatch.setattr(exported, "open_session", lambda file: Session(detector.model, detector.config))
    assert isinstance(detector.deployed, ExportedModel) is used
    assert not isinstance(april_detector(detector).deployed, ExportedModel)  # the file has today's score


def test_what_test_py_changes_leaves_the_file_in_use(checkpoint, monkeypatch, caplog):
    """What a run validates, or a category's name, changes no output; another score does."""
    path = checkpoint(**BANK, eval__every=1)
    path.with_name("model.onnx").write_bytes(b"")
    trained = load_detector(path, device="cpu")
    monkeypatch.setattr(exported, "open_session", lambda file: Session(trained.model, trained.config))
    asked = test_command.parse_arguments(["--checkpoint", str(path)])
    change = partial(test_command.evaluated_config, args=asked)
    assert isinstance(load_detector(path, device="cpu", change=change).deployed, ExportedModel)
    asked.set = ["score.map_sigma=1"]
    assert not isinstance(load_detector(path, device="cpu", change=change).deployed, ExportedModel)


def test_a_file_of_other_weights_is_not_used(checkpoint, monkeypatch, caplog):
    path = checkpoint(**BANK)
    path.with_name("model.onnx").write_bytes(b"")
    detector = load_detector(path, device="cpu")
    earlier = Session(detector.model, detector.config)
    detector.model.bank += 1
    monkeypatch.setattr(exported, "open_session", lambda file: earlier)
    assert not isinstance(detector.deployed, ExportedModel)
    assert "is of other weights or settings, so PyTorch predicts; run export.py again" in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("no onnxruntime"), "onnxruntime is not installed, so PyTorch predicts"),
        (RuntimeError("no protobuf\nat x.cc:1"), "cannot be opened, so PyTorch predicts: no protobuf"),
    ],
)
def test_a_file_that_cannot_be_opened_is_told(checkpoint, monkeypatch, caplog, error, said):
    def fail(file):
        raise error

    path = checkpoint(**BANK)
    path.with_name("model.onnx").write_bytes(b"cut")
    monkeypatch.setattr(exported, "open_session", fail)
    with caplog.at_level("INFO", logger="uninet"):
        assert not isinstance(load_detector(path, device="cpu").deployed, ExportedModel)
    assert said in caplog.text and "x.cc" not in caplog.text


def by_pytorch(model, images, about, rate, *, factor=1.0, inverted=False):
    """An export that PyTorch itself computes, with maps too large by `factor`, or flags that are wrong."""

    def run(images, rate=rate):
        outputs = [x.numpy() for x in model(torch.from_numpy(images), torch.tensor(float(rate)))]
        outputs[1] = factor * outputs[1]
        return [*outputs[:3], ~outputs[3]] if inverted else outputs

    return Exported(b"a file", run)


CALIBRATION = {"scores": [float(i) for i in range(150)], "low": 0.0, "high": 1.0}


def test_a_wrong_export_is_not_written(checkpoint, monkeypatch, capfd):
    path = checkpoint()
    monkeypatch.setattr(export_command, "to_onnx", partial(by_pytorch, factor=1.01))
    assert export(path) == 1
    err = capfd.readouterr().err
    assert "anomaly_map differs from PyTorch's" in err and err.count("\n") == 1
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.slow
def test_a_wrong_resize_is_not_written(checkpoint, monkeypatch, capfd):
    def nearest(decode, images):
        return F.interpolate(images.movedim(-1, -3).double(), decode.size)

    path = checkpoint()
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    monkeypatch.setattr(Decode, "fit_tensor", nearest)
    assert export(path) == 1
    assert "differs from PyTorch's" in capfd.readouterr().err
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(("inverted", "code"), [(False, 0), (True, 1)])
@pytest.mark.slow
def test_wrong_decisions_are_not_written(checkpoint, monkeypatch, capfd, inverted, code):
    path = checkpoint(calibration=CALIBRATION)
    monkeypatch.setattr(export_command, "to_onnx", partial(by_pytorch, inverted=inverted))
    assert export(path) == code
    assert ("does not decide as predict.py does" in capfd.readouterr().err) is inverted
    assert path.with_name("model.onnx").exists() is not inverted


@pytest.mark.slow
def test_a_rate_that_flags_nothing_is_told(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    path = checkpoint(calibration=CALIBRATION)
    assert export(path, "--false-alarm-rate", "0.001") == 0
    assert "guarantee a false-alarm rate of 0.00662 at best" in capfd.readouterr().err
    assert export(path, "--false-alarm-rate", "1") == 2


@pytest.mark.slow
def test_scores_held_out_in_bf16_are_told(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    path = checkpoint(calibration=CALIBRATION, run__eval_precision="bf16")
    assert export(path) == 0
    err = capfd.readouterr().err
    assert "scores in fp32 with held-out ones in bf16: take them as approximate" in err
    about = export_command.describe(load_detector(path, device="cpu", precision="fp32"), 0.01)
    assert about["held_out_precision"] == "bf16"


@pytest.mark.parametrize(("wrong", "code"), [(None, 0), (lambda images: images[..., 0, :, :], 1)])
def test_stacked_frames_are_made_grey_inside(checkpoint, tmp_path, monkeypatch, capfd, wrong, code):
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    if wrong:
        monkeypatch.setattr(export_command, "grey_tensor", wrong)
    path = checkpoint(data__stack_frames=1, **BANK)
    clip = new_images(tmp_path / "new")
    shutil.move(clip / "below/grey.bmp", clip)  # a clip is one folder
    assert export(path, "--images", str(clip)) == code
    out, err = capfd.readouterr()
    assert "differs from PyTorch's" in err if wrong else "on 11 images of 7 sizes" in out


def test_what_no_onnx_file_can_hold_is_refused_at_once(checkpoint, monkeypatch, capfd):
    monkeypatch.setattr(export_command, "to_onnx", None)
    path = checkpoint(model__name="memory-bank")
    bank = load_checkpoint(path).model["bank"]
    monkeypatch.setattr("export.LARGEST_FILE", bank.numel() * bank.element_size())
    assert export(path) == 1
    err = capfd.readouterr().err
    assert "GiB, an ONNX file at most" in err and "model.bank_fraction" in err and err.count("\n") == 1


@pytest.mark.slow
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


def test_a_run_without_test_images(checkpoint, tmp_path, mvtec_like, monkeypatch, capfd):
    """Of good parts alone, as the README has them."""
    good = shutil.copytree(mvtec_like / "part/train", tmp_path / "own/part/train").parent.parent
    path = checkpoint(root=good, path="configs/folder.yaml")
    monkeypatch.setattr(export_command, "write_demo", lambda root: mvtec_like)
    monkeypatch.setattr(export_command, "to_onnx", by_pytorch)
    assert run_command(export_command.main, ["--checkpoint", str(path)]) == 0
    assert "on demo images, as the run's own are not there: it has no test image" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["last.pt", "."])
def test_output_is_a_checkpoint_or_a_folder(checkpoint, capfd, name):
    """Said before the long work, and nothing is replaced."""
    path = checkpoint()
    before = path.read_bytes()
    assert export(path, "--output", str(path.parent / name)) == 1
    assert "is a folder or a checkpoint; name a file, such as model.onnx" in capfd.readouterr().err
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.slow
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
