"""What a run is: identity, what is reused or gone on with, what --overwrite deletes, unfinished states."""

import dataclasses
import json
import os
import shutil
import signal
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from conftest import LITE0, TINY, write_mask

import predict as predict_command
import test as test_command
import train as train_command
from datasets.build import build_test, data_identity
from datasets.loader import TrainingOrder, batches, training_batches
from datasets.splits import WHOLE, content_digest
from datasets.transforms import Normalise
from evaluation.results import write_results
from evaluation.scoring import calibrate, score_images
from model import build_model
from model.decision import Prediction
from model.inference import ScoringOptions
from model.peers.memory_bank import MemoryBank
from utils.checkpoint import Checkpoint, load_checkpoint, load_trained
from utils.cli import run_command
from utils.config import Config, RunOptions
from utils.device import peak_memory_gb, reset_peak_memory
from utils.errors import CheckpointError, ConfigError, DatasetError, RunError
from utils.runs import (
    LOCK,
    check_same,
    clear_run,
    config_hash,
    differences,
    earlier,
    identity_of,
    locked,
    place_of,
    run_folder,
)

SMALL = [
    "--category", "part", "--backbone", TINY, "--precision", "fp32", "--device", "cpu",
    "--quiet", "--name", "r", "--set", "data.image_size=64", "--weights", "random", "--set",
    "model.width=0.25", "--set", "train.batch_size=2", "--save-every", "1",
]  # fmt: skip
DATA = {"root": "/data", "images": {"train": 1}, "fingerprint": "a", "weights": None}


CPU = torch.device("cpu")


@pytest.fixture
def run(mvtec_like, tmp_path, capfd):
    """Run train.py in this process; gives (exit code, stdout, stderr)."""

    def call(*flags, command=train_command, base=True):
        argv = ["--data-root", str(mvtec_like), "--output", str(tmp_path / "runs"), *SMALL] if base else []
        code = run_command(command.main, [*argv, *map(str, flags)])
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs/mvtec/one-class/part/r"


@pytest.fixture
def state(make_config, folder):
    """Writes an untrained state of step 2 of 100 as last.pt, uninet's with a root; keywords change fields."""

    def write(**fields):
        root = fields.pop("root", None)
        settings = {"run__data_root": root, "data__category": "part", "model__width": 0.25}
        config = make_config(train__iterations=100, data__calibration_fraction=0.2, **settings)
        model = build_model(config, pretrained=False) if root else torch.nn.Linear(1, 1)
        given = {"optimizer": {}, "schedule": {}, "rng": {}} | fields
        Checkpoint(config, model.state_dict(), 2, **given).save(folder / "last.pt")
        return folder / "last.pt"

    return write


def one_line(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1


def other_value(kind, value, low, high):
    """A value of a setting's type that is not `value`."""
    kinds = [k for k in get_args(kind) if k is not type(None)] if type(None) in get_args(kind) else [kind]
    kind, origin = kinds[0], get_origin(kinds[0])
    if origin is Literal:
        return next(v for v in get_args(kind) if v != value)
    if origin is tuple:
        inner = get_args(kind)[0]
        first = value[0] if value else None
        return (other_value(inner, first, low, high), *(value or ())[1:])
    if origin is dict:
        return {"x": other_value(get_args(kind)[1], None, low, high)}
    if kind is bool:
        return not value
    if kind is str:
        return f"{value}x"
    return next(kind(v) for v in (low, high, (low + high) / 2) if kind(v) != value)


SETTINGS = [
    (section.name, spec)
    for section in dataclasses.fields(Config)
    for spec in dataclasses.fields(get_type_hints(Config)[section.name])
]


class TestIdentity:
    @pytest.mark.parametrize(("section", "spec"), SETTINGS, ids=[f"{s}.{spec.name}" for s, spec in SETTINGS])
    def test_every_setting_is_part_of_it_and_no_other_option_than_the_precision(
        self, make_config, section, spec
    ):
        config = make_config()
        part = getattr(config, section)
        kind, value = get_type_hints(type(part))[spec.name], getattr(part, spec.name)
        value = other_value(kind, value, spec.metadata.get("low", 0), spec.metadata.get("high", 1))
        other = dataclasses.replace(config, **{section: dataclasses.replace(part, **{spec.name: value})})
        key = f"{section}.{spec.name}"
        found = differences(identity_of(config, DATA), identity_of(other, DATA))
        own = section != "run" or key == "run.eval_precision"
        assert [text.partition(" ")[0] for text in found] == ([key] if own else [])
        apart = own and key != "train.seed"
        assert (config_hash(config) != config_hash(other)) == apart

    def test_settings_that_came_or_went_since(self, make_config):
        new = identity_of(make_config(), DATA)
        old = {"settings": dict(new["settings"]), "data": DATA}
        del old["settings"]["data.tile"]  # younger: the value of base.yaml, which is the one now
        assert differences(old, new) == []
        old["settings"]["loss.gone"] = 1
        assert differences(old, new) == ["loss.gone (no longer a setting)"]

    @pytest.mark.parametrize("change", ["image", "test image", "mask", "label", "new", "removed", "weights"])
    def test_data_is_part_of_it(self, make_config, mvtec_like, tmp_path, change):
        (tmp_path / "w.pth").write_bytes(b"weights")
        where = {"run__data_root": str(mvtec_like), "data__category": "part"}
        config = make_config(**where, model__weights=str(tmp_path / "w.pth"))
        before, base = train_command.contents(config)[2], mvtec_like / "part"
        assert train_command.contents(config)[2] == before
        masks = base / "ground_truth/spot"
        if change == "mask":
            write_mask(masks / "000_mask.png", value=254)
        elif change.endswith("image"):
            path = base / ("train/good/000.jpg" if change == "image" else "test/dot/8.bmp")
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1  # the same size
            path.write_bytes(content)
        elif change == "label":
            (base / "test/spot").rename(base / "test/scratch")
            masks.rename(base / "ground_truth/scratch")
        elif change == "new":
            (base / "test/good/new.png").write_bytes((base / "test/good/000.png").read_bytes()[:-1])
        elif change == "removed":
            (base / "train/good/000.jpg").unlink()
        else:
            (tmp_path / "w.pth").write_bytes(b"Weights")
        (found,) = differences(before, train_command.contents(config)[2])
        assert ("images" in found) == (change != "weights")
        assert ("model.weights" in found) == (change == "weights")
        if change == "removed":
            assert "12 train" in found and "now 11 train" in found

    def test_what_is_known_of_a_sample_is_part_of_it(self, make_config, mvtec_like):
        config = make_config(run__data_root=str(mvtec_like), data__category="part")
        _, data, before = train_command.contents(config)
        sample = data.test.samples[-1]
        for changed in ({"label": 0}, {"category": "x"}, {"defect": "x"}, {"mask_path": None},
                        {"more_masks": (sample.path,)}, {"earlier": (sample.path,)}):  # fmt: skip
            data.test.samples[-1] = dataclasses.replace(sample, **changed)
            assert data_identity(config, data)["fingerprint"] != before["data"]["fingerprint"], changed
        data.test.samples[-1] = sample
        assert data_identity(config, data) == before["data"]
        data.train.samples.append(data.test.samples.pop())  # from one set to another
        assert data_identity(config, data)["fingerprint"] != before["data"]["fingerprint"]

    def test_roots_count_as_what_they_stand_for(self, make_config, mvtec_like, tmp_path, monkeypatch):
        def identity(root):
            return train_command.contents(make_config(run__data_root=root, data__category="part"))[2]

        whole = identity(str(mvtec_like))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(mvtec_like)
        for root in ("~/data", "data", "./link", str(tmp_path / "link")):
            assert differences(whole, identity(root)) == []
        mvtec_like.rename(tmp_path / "moved")
        (found,) = differences(whole, identity("moved"))
        assert found == f"the folder of the data ({tmp_path}/data, now {tmp_path}/moved)"
        mvtec_like.symlink_to(tmp_path / "moved")  # the way out: a link where it was
        assert differences(whole, identity("data")) == []

    def test_large_files_are_looked_at_in_pieces(self, tmp_path):
        content = np.random.default_rng(0).bytes(20 * WHOLE)
        found = set()
        for at in (0, 1000, len(content) - 1, None):
            changed = bytearray(content)
            if at is not None:
                changed[at] ^= 1
            (tmp_path / "x").write_bytes(changed)
            found.add(content_digest(tmp_path / "x"))
        assert len(found) == 4 and content_digest(tmp_path / "none") == "unreadable"


class TestEarlierRuns:
    """The three places where something of an earlier run is used: metrics.json, last.pt, best.pt."""

    def write(self, kind, folder, config, identity):
        if kind == "metrics.json":
            about = {
                "command": "",
                "timing": {},
                "model": torch.nn.Identity(),
                "identity": identity,
                "step": 1,
            }
            write_results(folder, config, {"part": {}}, **about)
        else:
            value = 0.5 if kind == "best.pt" else None
            Checkpoint(config, {"a": torch.zeros(1)}, 1, identity, value=value).save(folder / kind)

    @pytest.mark.parametrize("kind", ["metrics.json", "last.pt", "best.pt"])
    def test_only_of_the_same_run(self, make_config, folder, kind):
        config, other = make_config(), make_config(train__seed=1, loss__kd_weight=0.5)
        own = identity_of(config, DATA)
        self.write(kind, folder, config, own)
        done, state, best = earlier(folder, own, resume=True)
        assert (done is not None, state is not None, best is not None) == (
            kind == "metrics.json", kind == "last.pt", kind == "best.pt",
        )  # fmt: skip
        if kind != "metrics.json":
            with pytest.raises(RunError, match=r"unfinished run; --resume goes on with it, --overwrite"):
                earlier(folder, own, resume=False)
        changed = {
            r"train.seed \(0, now 1\)": identity_of(other, DATA),
            r"loss.kd_weight \(0.7, now 0.5\).*--name.*--overwrite": identity_of(other, DATA),
            r"the folder of the data \(/data, now /b\)": identity_of(config, DATA | {"root": "/b"}),
            r"images.*\(1 train, now 1 train\)": identity_of(config, DATA | {"fingerprint": "b"}),
        }
        for message, identity in changed.items():
            with pytest.raises(RunError, match=message):
                earlier(folder, identity, resume=True)
        self.write(kind, folder, config, None)
        with pytest.raises(RunError, match="does not record which run it is of"):
            earlier(folder, own, resume=True)

    def test_many_differences_are_counted(self, make_config, tmp_path):
        own, other = (identity_of(make_config(model__name=name), DATA) for name in ("uninet", "memory-bank"))
        with pytest.raises(RunError, match=r"memory-bank, now uninet.* and \d+ more; give") as error:
            check_same(other, own, tmp_path)
        assert "\n" not in str(error.value)

    def test_by_train_py(self, run, mvtec_like, tmp_path, monkeypatch):
        flags = ("--model", "memory-bank")
        code, first, _ = run(*flags)
        assert code == 0 and run(*flags)[:2] == (0, first)
        for changed in (("--seed", "1"), ("--model", "uninet"), ("--set", "model.bank_fraction=0.2")):
            code, out, err = run(*flags, *changed)
            assert code == 1 and out == "" and one_line(err) and "differs in" in err
        mvtec_like.rename(tmp_path / "other")
        mvtec_like = tmp_path / "other"
        code, out, err = run(*flags, "--data-root", mvtec_like)
        assert code == 1 and out == "" and one_line(err) and "now " + str(mvtec_like) in err

    def test_a_best_state_is_kept_with_its_step(self, run, folder, monkeypatch):
        flags = ("--iterations", "2", "--select", "best", "--set", "eval.every=1", "--eval", "none")
        values = iter((0.9, 0.5))
        monkeypatch.setattr(
            train_command, "results_by_category", lambda *_: {"part": {}, "mean": {"pro": next(values)}}
        )
        assert run(*flags)[0] == 0
        assert load_checkpoint(folder / "best.pt").iteration == 1
        kept = load_checkpoint(folder / "last.pt")
        assert (kept.iteration, kept.finished) == (1, True)
        assert json.loads((folder / "metrics.json").read_text())["protocol"]["iterations"] == 1
        assert load_checkpoint(folder / "best.pt").identity == kept.identity
        (folder / "metrics.json").unlink()
        (folder / "last.pt").unlink()
        code, _, err = run(*flags, "--resume", "--seed", "1")
        assert code == 1 and one_line(err) and "best.pt" in err and "train.seed (0, now 1)" in err


def test_a_bank_that_was_stopped_while_it_evaluated_is_not_fitted_again(run, folder, monkeypatch):
    flags = ("--model", "memory-bank", "--backbone", LITE0, "--set", "model.weights=null")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "results_by_category", stopped)
        assert run(*flags)[0] == 1
    before = load_checkpoint(folder / "last.pt").model
    monkeypatch.setattr(MemoryBank, "fit", stopped)
    assert run(*flags, "--resume")[0] == 0
    after = load_checkpoint(folder / "last.pt").model
    assert all(torch.equal(before[name], after[name]) for name in before)
    result = json.loads((folder / "metrics.json").read_text())["results"]["part"]
    assert result["pixel_auroc"] > 0.9


class TestNamesAndOverwrite:
    @pytest.mark.parametrize("name", ["/some/folder", "a/b", "..", "../up", ".", "", ".hidden", "a\\b"])
    def test_a_name_is_that_of_one_folder(self, run, tmp_path, name):
        code, _, err = run("--name", name)
        assert code == 2 and one_line(err) and "--name is" in err and not (tmp_path / "runs").exists()

    def test_other_parts_of_the_path(self, make_config, tmp_path):
        config = make_config(data__category="../up")
        with pytest.raises(ConfigError, match="--category is"):
            run_folder(config, tmp_path)
        assert run_folder(make_config(model__backbone="hub/../../x"), tmp_path).parent == tmp_path / (
            "mvtec/one-class/all"
        )

    def test_a_foreign_folder_is_left_alone(self, run, folder):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("of another program")
        for flags in ((), ("--overwrite",), ("--resume",)):
            code, _, err = run("--iterations", "1", *flags)
            assert code == 1 and one_line(err) and "was not made by this program" in err
        assert [p.name for p in folder.iterdir()] == ["config.yaml"]
        (folder / "last.pt").write_text("of another program")
        assert "is no checkpoint of this program" in run("--iterations", "1", "--resume")[2]
        assert "was not made by this program" in run("--iterations", "1", "--overwrite")[2]
        assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "last.pt"]

    def test_only_what_the_program_writes_is_deleted(self, folder, tmp_path):
        with locked(folder):
            pass
        own = [
            "config.yaml", "log.jsonl", "last.pt", "best.pt", "metrics.json", "scores.csv", "skipped.csv",
            "report.html", "heatmaps.png", "clips.png", "events.out.tfevents.1.host", "model.onnx",
            "test/metrics.json", "test/scores.csv", "test/maps/part/test/000.tiff",
            "test/april-2025/metrics.json", "test-alpha0.1/metrics.json", "test-alpha0.1/report.html",
            "test-stopped/unfinished", "test-stopped/scores.csv",
        ]  # fmt: skip
        foreign = ["notes.txt", "my/metrics.json", "test-images/000.png", "test/maps/readme.md"]
        foreign += ["test-photos/config.yaml", "test-photos/scores.csv", "test-photos/maps/mine.tiff"]
        outside = tmp_path / "elsewhere/metrics.json"
        for path in (*(folder / name for name in (*own, *foreign)), outside):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        (folder / "test-link").symlink_to(outside.parent)
        clear_run(folder)
        left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        assert left == sorted([LOCK, *foreign]) and outside.is_file() and (folder / "test-link").is_symlink()
        assert not (folder / "test/april-2025").exists() and not (folder / "test-alpha0.1").exists()

    def test_by_train_py(self, run, folder):
        flags = ("--model", "memory-bank", "--eval", "none")
        assert run(*flags)[0] == 0
        (folder / "notes.txt").write_text("mine")
        (folder / "test").mkdir()
        (folder / "test/metrics.json").write_text("{}")
        assert run(*flags, "--seed", "1", "--overwrite")[0] == 0
        assert (folder / "notes.txt").is_file() and not (folder / "test").exists()
        assert load_checkpoint(folder / "last.pt").identity["settings"]["train.seed"] == 1

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--weights", "missing.pth"), "missing.pth"),
            (("--backbone", "no_such_net"), "no_such_net"),
            (("--set", "train.batch_size=64", "--set", "train.last_batch=drop"), "make no batch of 64"),
        ],
    )
    def test_what_cannot_start_deletes_nothing(self, run, folder, flags, said):
        """One line says why; the finished run is still there."""
        assert run("--iterations", "1", "--eval", "none")[0] == 0
        before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        code, _, err = run("--iterations", "1", "--overwrite", *flags)
        assert code != 0 and said in err and one_line(err)
        assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


class TestStatesThatAreNoEnd:
    def test_are_told_and_counted_by_their_own_step(self, run, state, mvtec_like, folder, tmp_path):
        path = state(root=str(mvtec_like))
        code, out, err = run("--checkpoint", path, "--quiet", command=test_command, base=False)
        assert code == 0 and "the state after step 2 of 100" in err and "NOT A FAIR PROTOCOL" in out
        protocol = json.loads((folder / "test/metrics.json").read_text())["protocol"]
        assert (protocol["iterations"], protocol["fair"]) == (2, False)
        report = (folder / "test/report.html").read_text()
        assert "2 steps of 8" in report and "the state of step 2 of 100" in report
        flags = (
            "--checkpoint",
            folder,
            "--quiet",
            mvtec_like / "part/test/dot",
            "--output",
            tmp_path / "out",
        )
        code, _, err = run(*flags, command=predict_command, base=False)
        assert code == 0 and "step 2 of 100" in err and "has not finished its training" in err
        assert "trained without" not in err

    def test_an_end_is_not_told(self, state, caplog):
        ended = {"optimizer": None, "schedule": None, "rng": None}
        assert load_trained(state(**ended))[1].finished and caplog.text == ""
        assert not load_trained(state(**ended, value=0.5))[1].finished and "step 2 of 100" in caplog.text


class TestPrecision:
    """`auto` is fixed when a run begins, and goes with the run to other machines."""

    @pytest.mark.parametrize("name", [None, "r"])
    def test_a_run_goes_on_in_its_own(self, make_config, tmp_path, name):
        config = make_config(train__precision="auto", run__eval_precision="auto")
        fixed, folder = place_of(config, tmp_path, name, machine="bf16")
        assert fixed.train.precision == fixed.run.eval_precision == "bf16"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(fixed.to_dict()))
        elsewhere = place_of(config, tmp_path, name, machine="fp32")
        assert elsewhere[0].train.precision == "fp32"  # nothing to go on with yet
        (folder / "last.pt").write_text("")
        assert place_of(config, tmp_path, name, machine="fp32") == (fixed, folder)
        again = place_of(config, tmp_path, name, machine="fp32", anew=True)
        assert again == elsewhere and (again[1] == folder) == (name == "r")
        asked = make_config(train__precision="fp32", run__eval_precision="auto")
        assert place_of(asked, tmp_path, name, machine="fp32")[0].train.precision == "fp32"

    def test_by_train_py(self, run, tmp_path, monkeypatch):
        flags = ("--model", "memory-bank", "--eval", "none", "--set", "train.precision=auto")
        for machine, name in (("bf16", []), ("fp32", ["--resume"])):
            monkeypatch.setattr("utils.runs.choose_precision", lambda *_, found=machine: found)
            assert run(*flags, *name)[0] == 0
        (found,) = tmp_path.rglob("metrics.json")
        assert json.loads(found.read_text())["identity"]["settings"]["train.precision"] == "bf16"


class TestWhatIsNotFinite:
    def test_in_scores(self, make_config, mvtec_like):
        config = make_config(run__data_root=str(mvtec_like), data__category="part")
        data = train_command.contents(config)[1].test

        class Broken(torch.nn.Module):
            value = "0"

            def predict(self, images):
                maps = torch.zeros(len(images), 64, 64)
                maps[-1, 3, 3] = float(self.value)
                return Prediction(maps, torch.zeros(len(images)))

        options = ScoringOptions(4, torch.device("cpu"), "fp32", quiet=True)
        for Broken.value in ("nan", "inf"):
            with pytest.raises(FloatingPointError, match=f"{data.samples[3].path.name} is not finite"):
                score_images(Broken(), data, options)
        Broken.value = "0"
        scores = score_images(Broken(), data, options)
        calibrate(scores)
        scores.score[2] = np.nan
        with pytest.raises(FloatingPointError, match="held-out normals are not finite"):
            calibrate(scores)

    def test_in_a_bank(self, make_config):
        bank = build_model(make_config(model__name="memory-bank"), pretrained=False)
        with pytest.raises(FloatingPointError, match="features of the training images are not finite"):
            bank.fit([torch.full((1, 3, 64, 64), float("nan"))], seed=0)

    def test_is_neither_saved_nor_loaded(self, make_config, tmp_path, monkeypatch):
        config, path = make_config(), tmp_path / "x.pt"
        bad = torch.tensor([1.0, float("nan")])
        Checkpoint(config, {"a": torch.zeros(2)}, 1).save(path)
        before = path.read_bytes()
        for name, fields in (
            ("model.a.b", {"model": {"a.b": bad}}),
            ("optimizer.state.0.exp_avg", {"model": {}, "optimizer": {"state": {0: {"exp_avg": bad}}}}),
        ):
            with pytest.raises(FloatingPointError, match=f"^{name} is not finite after step 3"):
                Checkpoint(config, **fields, iteration=3).save(path)
        assert path.read_bytes() == before
        monkeypatch.setattr("utils.checkpoint.not_finite", lambda tree: None)
        Checkpoint(config, {"a": bad}, 1, calibration={"scores": (float("inf"),)}).save(path)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=r"model\.a has values that are not finite"):
            load_checkpoint(path)


class TestBatchesOfEvaluation:
    """--eval-batch-size changes no result, nor do loaders change what models draw."""

    @pytest.mark.parametrize("tile", [None, 64])
    def test_the_bank_is_drawn_image_by_image(self, make_config, tile):
        size = 64 if tile is None else 128
        config = make_config(model__name="memory-bank", data__image_size=size, data__tile=tile)
        images, found = torch.randn(3, 3, size, size), []
        bank = build_model(config, pretrained=False)
        for bank.batch_size in (1, 2, 5):  # of tiles
            bank.fit(images.split(bank.batch_size), seed=0)
            found.append(bank.state_dict()["bank"])
        assert len(found[0]) == 3 * (1 if tile is None else 9) * round(0.1 * 64)
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)

    def test_loaders_draw_from_no_generator_but_their_own(self, make_config, mvtec_like):
        config = make_config(run__data_root=str(mvtec_like), data__category="part")
        data = train_command.contents(config)[1].train
        before = torch.get_rng_state()
        order = TrainingOrder(len(data), 2, seed=0, start=0, stop=2)
        assert len(list(training_batches(data, order, workers=0, device=CPU))) == 2 and list(batches(data, 4))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_test_image_that_is_trained_on_is_found_below_home(make_config, mvtec_like, monkeypatch, tmp_path):
    """`~` in --data-root; the image is byte-identical."""
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = make_config(run__data_root="~/data", data__category="part")
    tested = dataclasses.replace(trained, run=RunOptions(data_root=str(tmp_path / "new")))
    shutil.copytree(mvtec_like, tmp_path / "new")
    copy = tmp_path / "new/part/test/good/000.png"
    copy.write_bytes((mvtec_like / "part/train/good/000.jpg").read_bytes())
    normalise = Normalise((0.5,) * 3, (0.5,) * 3)
    other = dataclasses.replace(tested, data=dataclasses.replace(tested.data, name="folder"))
    with pytest.raises(DatasetError, match="is the same file as"):
        build_test(other, trained, normalise)


def test_a_category_called_mean(run, mvtec_like, tmp_path):
    (mvtec_like / "part").rename(mvtec_like / "mean")
    flags = ("--category", "mean", "--model", "memory-bank")
    code, out, err = run(*flags)
    assert code == 0 and "mean (category)" in out, err
    (found,) = tmp_path.rglob("metrics.json")
    results = json.loads(found.read_text())["results"]
    assert results["mean (category)"] == results["mean"]


def test_peak_memory_is_counted_anew_for_each_run():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    large = torch.ones(1 << 26)  # 256 MB
    high = peak_memory_gb(cpu)
    del large
    reset_peak_memory(cpu)
    if peak_memory_gb(cpu) == high:
        pytest.skip("this system does not let a process reset its peak")
    assert high - peak_memory_gb(cpu) > 0.2


@pytest.mark.parametrize(("command", "advice"), [
    (train_command, "--resume goes on from there"), (test_command, None), (predict_command, None),
])  # fmt: skip
def test_what_a_stopped_command_advises(command, advice, monkeypatch, capfd):
    def stopped(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "parse_arguments", stopped)
    assert run_command(command.main, []) == 1
    err = capfd.readouterr().err
    assert err.startswith("stopped") and err.count("\n") == 1
    assert (advice in err) if advice else ("--resume" not in err)
