"""Weights of other programs become runs that compute the same, and a run becomes a file of the authors."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from their_networks import (
    RESTORE,
    TABLES,
    TINY,
    WIDE,
    authors,
    mem_bottleneck,
    recontrast,
    tiny_resnet,
    values,
    wide_resnet,
    write,
)

import export
import predict
import test as test_command
from model import backbone, build_model, load_detector
from scripts import convert_weights
from scripts.convert_weights import UNUSED, config_of, main, read_tensors, to_ours, to_uninet
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import run_command
from utils.errors import CheckpointError, ConfigError, RunError
from utils.runs import check_same
from utils.yaml_io import read_yaml

SMALL = ["--set", "model.backbone=test_resnet", "--set", "data.image_size=64"]
ONE = ["--dataset", "mvtec", "--category", "part"]
PART = {"data.name": "mvtec", "data.category": "part", "model.weights": "random"}


def on_meta(table):
    return {name: torch.empty(shape, device="meta") for name, shape in table.items()}


# --- names --------------------------------------------------------------------------------------------------


def test_counts():
    table = authors(WIDE, wide_resnet)
    parts = [name.split(".")[0] for name in table]
    assert {part: parts.count(part) for part in parts} == {"tt": 258, "bn": 141, "st": 254}
    assert len(authors(WIDE, wide_resnet, polyp=True)) == len(table) + 1
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    used = [
        math.prod(shape)
        for name, shape in mem_bottleneck("bn.", WIDE, 256).items()
        if not name.endswith(buffers) and not UNUSED.match(name.replace("bn_layer.0.", "bn_layer."))
    ]
    assert sum(used) == 40_137_216


@pytest.mark.parametrize("name", TABLES)
def test_all_names_and_shapes_of_wide_resnet(monkeypatch, tmp_path, name):
    """Without values: of the largest networks only names and shapes are of interest."""
    monkeypatch.setattr(backbone, "_has_negative_features", lambda *_: False)
    config = config_of(tmp_path, name, PART)
    with torch.device("meta"):
        start = build_model(config).state_dict()
    theirs = on_meta(TABLES[name](WIDE, wide_resnet))
    theirs = {key.replace("bn_layer.0.", "bn_layer.", name != "recontrast"): x for key, x in theirs.items()}
    monkeypatch.setattr(convert_weights, "not_finite", lambda _: None)
    found = to_ours(theirs, name, config, start, file=tmp_path)
    assert {k: x.shape for k, x in found.items()} == {k: x.shape for k, x in start.items()}
    first = next(iter(theirs))
    shape = list(theirs.pop(first).shape)
    with pytest.raises(
        CheckpointError, match=re.escape(f"expected {first} of shape {shape}, found none (1 in all")
    ):
        to_ours(theirs, name, config, start, file=tmp_path)


# --- what the networks compute ------------------------------------------------------------------------------


@pytest.fixture
def convert(tmp_path, capsys):
    """Write a file with random tensors, and convert it: its tensors and the run's folder."""

    def convert(name, *flags, tensors=None):
        tensors = tensors or values(TABLES[name]())
        file, run = write(tmp_path / f"{name}.pth", tensors, name), tmp_path / name
        words = [str(file), "--from", name, "--output", str(run), *(flags or ONE), *SMALL]
        assert run_command(main, [*words, "--weights", "random"]) == 0, capsys.readouterr().err
        return read_tensors(file), run

    return convert


TEACHERS = {
    "uninet": {"target": "tt."},
    "recontrast": {"source": "encoder_freeze.", "target": "encoder."},
    "anomalib": {f"{x}": f"model.teachers.{x}_teacher." for x in ("source", "target")},
}


@torch.no_grad()
@pytest.mark.parametrize("name", TABLES)
def test_a_converted_model_computes_the_same(convert, name):
    theirs, run = convert(name)
    model = load_detector(run, device="cpu").model
    features = [torch.rand(2, c, side, side) for c, side in zip(TINY, (16, 8, 4))]
    found = model.student(model.bottleneck(features), features)
    for a, b in zip(found, RESTORE[name](theirs, features)):
        assert a.std() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for part, begins in TEACHERS[name].items():
        state = getattr(model.teachers, part).state_dict()
        assert all(torch.equal(state[key], theirs[begins + key]) for key in tiny_resnet())
    theta = model.dfs.theta[1]
    if name == "anomalib":
        expected = (1 / (1 + (-theirs["model.dfs.theta2"]).exp()) + 0.5).clamp(max=1)
        torch.testing.assert_close(theta, expected)
        assert 0.5 < expected.min() < expected.max() == 1
    else:
        assert (theta == 1).all()


# --- as a run -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_a_run_and_says_that_it_was_selected_on_the_test_set(convert, mvtec_like, tmp_path, capsys):
    _, run = convert("uninet")
    assert "selected on the test set" in capsys.readouterr().err
    data = ["--checkpoint", str(run), "--device", "cpu", "--quiet"]
    flags = [*data, "--data-root", str(mvtec_like), "--protocol", "april-2025"]
    assert run_command(test_command.main, flags) == 0
    assert "NOT A FAIR PROTOCOL: the best of several evaluations on the test set" in capsys.readouterr().out
    fair, april = (json.loads((run / "test" / p / "metrics.json").read_text()) for p in ("", "april-2025"))
    assert fair["protocol"]["fair"] is april["protocol"]["fair"] is False
    assert fair["protocol"]["select"] == "best" and fair["protocol"]["iterations"] == 0
    assert fair["identity"]["converted"]["from"] == "uninet"
    assert fair["results"]["part"]["image_auroc"] is not None
    assert april["results"]["part"]["pixel_auroc"] == fair["results"]["part"]["pixel_auroc"]
    images = str(mvtec_like / "part/test/good")
    assert run_command(predict.main, [*data, images, "--output", str(tmp_path / "new")]) == 0
    assert (tmp_path / "new/scores.csv").read_text().count("\n") == 5
    config = read_yaml(run / "config.yaml")
    assert config["model"]["flavor"] == "released" and config["data"]["category"] == "part"


@pytest.mark.slow
def test_it_can_be_exported(convert, mvtec_like):
    _, run = convert("anomalib")
    flags = ["--checkpoint", str(run), "--images", str(mvtec_like / "part/test")]
    assert run_command(export.main, flags) == 0 and (run / "model.onnx").is_file()


def test_the_end_of_a_training_is_fair(convert, mvtec_like):
    _, run = convert("recontrast", *ONE, "--set", "eval.select=last")
    flags = ["--checkpoint", str(run), "--data-root", str(mvtec_like), "--device", "cpu", "--quiet"]
    assert run_command(test_command.main, flags) == 0
    assert json.loads((run / "test/metrics.json").read_text())["protocol"]["fair"] is True


def test_anomalibs_score_is_the_highest_value_after_a_small_blur(tmp_path):
    score = config_of(tmp_path, "anomalib", PART).score
    assert (score.decision, score.blur_size, score.score_sigma, score.map_sigma) == ("max", 5, 4, 0)


def test_no_run_is_replaced(convert, tmp_path, capsys):
    _, run = convert("uninet")
    again = [str(tmp_path / "uninet.pth"), "--from", "uninet", "--output", str(run), *ONE]
    assert run_command(main, again) == 1
    assert "holds a run; choose another --output" in capsys.readouterr().err
    with pytest.raises(RunError, match="does not record which run it is of"):  # nor is a training resumed
        check_same(load_checkpoint(run / "last.pt").identity, {}, run)


# --- folders ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_of_the_authors_is_converted_whole(tmp_path, capsys):
    files = {
        "MVTec AD/transistor/BEST_P_PRO": "mvtec/one-class/transistor",
        "MVTec AD/transistor/BEST_P_ROC": "mvtec/one-class/transistor",
        "VisA/multiclass/BEST_I_ROC": "visa/multi-class/all",
        "VAD/BEST_I_ROC": "vad/supervised/all",
        "CVC-ClinicDB/BEST_DICE": "clinicdb/supervised/random",
    }
    for i, name in enumerate(files):
        write(tmp_path / f"ckpts/{name}.pth", values(authors(polyp="Clinic" in name), seed=i))
    words = [str(tmp_path / "ckpts"), "--from", "uninet", "--output", str(tmp_path / "runs"), *SMALL]
    assert run_command(main, [*words, "--weights", "random"]) == 0, capsys.readouterr().err
    for i, (name, place) in enumerate(files.items()):
        run = tmp_path / "runs" / place / name.rpartition("/")[2]
        config, theirs = read_yaml(run / "config.yaml"), values(authors(polyp="Clinic" in name), seed=i)
        state = torch.load(run / "last.pt", weights_only=True)["model"]
        assert torch.equal(state["bottleneck.fuse.0.0.0.weight"], theirs["bn.conv1.weight"])
        assert config["eval"]["select"] == "best" and config["model"]["mem_reparam"] == "construct"
        head = {"VAD": ("heads.0.linear.weight", "st.fc.weight")}
        head["CVC-ClinicDB"] = ("heads.0.conv.weight", "st.conv1x1_1.weight")
        ours, own = head.get(name.split("/")[0], (None, None))
        assert ours is None or torch.equal(state[ours], theirs[own])
        assert [key for key in state if key.startswith("heads.")] == [
            key for key in ("heads.0.linear.weight", "heads.0.linear.bias", "heads.0.conv.weight")
            if ours and key.startswith(ours.removesuffix("weight"))
        ]  # fmt: skip
        if "transistor" in name:  # the settings of a category
            assert config["model"]["dfs"] == "none" and config["data"]["resize"] == "lanczos"


def test_dataset_and_category_must_be_known(tmp_path):
    with pytest.raises(ConfigError, match="does not tell its dataset; give --dataset"):
        config_of(tmp_path / "BEST_P_PRO.pth", "uninet", {})
    with pytest.raises(
        ConfigError, match=r"give --category of btad \(01, 02, 03\), or --setting multi-class"
    ):
        config_of(tmp_path / "BEST_P_PRO.pth", "uninet", {"data.name": "btad"})


# --- what does not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("st.layer2.0.upsample.0.weight"),
         r"expected st.layer2.0.upsample.0.weight of shape \[192, 48, 2, 2\], found none \(1 in all\)"),
        (lambda t: t.update({"st.layer9.weight": torch.ones(3)}),
         r"expected no st.layer9.weight, found one of shape \[3\] \(1 in all\)"),
        (lambda t: t.update({"bn.bn3.bias": torch.ones(5)}),
         r"expected bn.bn3.bias of shape \[192\], found \[5\] \(1 in all\)"),
        (lambda t: t["bn.bn3.bias"].fill_(math.nan), r"not finite in bottleneck.fuse.1.0.1.bias"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(tmp_path, capsys, change, expected):
    tensors = values(authors())
    change(tensors)
    file = write(tmp_path / "x.pth", tensors)
    words = [str(file), "--from", "uninet", "--output", str(tmp_path / "run"), *ONE, *SMALL]
    assert run_command(main, [*words, "--weights", "random"]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.endswith("check --from, --dataset and --setting, or take another file")
    assert re.search(expected, line), line
    assert not (tmp_path / "run/last.pt").exists()


def test_another_programs_file(tmp_path):
    file = write(tmp_path / "x.pth", values(recontrast()), "recontrast")
    config = config_of(file, "uninet", PART)
    with pytest.raises(
        CheckpointError, match="is no file of uninet for this model: expected no encoder.conv1"
    ):
        to_ours(read_tensors(file), "uninet", config, {}, file=file)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_hostile_file_runs_nothing(tmp_path, capsys):
    torch.save({"tt": {}, "bn": Hostile(tmp_path / "mark")}, tmp_path / "x.pth")
    words = [str(tmp_path / "x.pth"), "--from", "uninet", "--output", str(tmp_path / "run"), *ONE]
    assert run_command(main, words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing of it was run. Save the state dict alone" in line and not (tmp_path / "mark").exists()


# --- and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [ONE, ["--dataset", "vad"], ["--dataset", "kvasir"]])
def test_a_run_opens_in_the_authors_code(convert, tmp_path, monkeypatch, flags):
    """Names and shapes are those of their networks, and what they use has the values that it came with."""
    monkeypatch.setitem(convert_weights.AUTHORS, "backbone", "test_resnet")
    table = authors(polyp="kvasir" in flags)
    theirs, run = convert("uninet", *flags, tensors=values(table))
    to_uninet(run, tmp_path / "back.pth")
    tree = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(tree) == ["tt", "bn", "st", "dfs"] and tree["dfs"] == {}
    back = {f"{part}.{name}": x for part, own in tree.items() for name, x in own.items()}
    assert {name: tuple(x.shape) for name, x in back.items()} == table
    back = read_tensors(tmp_path / "back.pth")
    with pytest.raises(RunError, match=r"back\.pth is there already; choose another --output"):
        to_uninet(run, tmp_path / "back.pth")
    used = [n for n in theirs if not UNUSED.match(n) or (n.startswith("st.fc.") and "vad" in flags)]
    assert len(used) > 400 and all(torch.equal(back[name], theirs[name]) for name in used)


@pytest.mark.parametrize("flag", [("--category", "bottle"), ("--set", "model.width=1")])
def test_a_run_takes_no_settings(tmp_path, capfd, flag):
    words = [str(tmp_path / "run"), "--to", "uninet", "--output", str(tmp_path / "back.pth"), *flag]
    assert run_command(main, words) == 2
    assert f"{flag[0]} is for --from" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "model.backbone test_efficientnet, expected wide_resnet50_2"),
        ({"model__backbone": "wide_resnet50_2"}, r"model.mem_kernels \(3, 7\), expected \(3, 3\)"),
        ({"model__name": "recontrast"}, "model.name recontrast, expected uninet"),
    ],
)
def test_other_networks_do_not_open_there(tmp_path, make_config, settings, problem):
    Checkpoint(make_config(**settings), {}, 1).save(tmp_path / "last.pt")
    with pytest.raises(
        CheckpointError, match=rf"has {problem}: the authors' code builds no other network. Train"
    ):
        to_uninet(tmp_path, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


@pytest.mark.slow
def test_from_any_folder(tmp_path):
    """As a file, without the repository on the path."""
    words = [sys.executable, "-B", ROOT / "scripts/convert_weights.py", "--help"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--from" in done.stdout
