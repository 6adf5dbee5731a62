"""train.py and test.py as commands on a tiny dataset: files, determinism, resume, protocols, mistakes."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
from conftest import LITE0, ROOT, TINY
from distributed_worker import SMALL_UNIAS
from PIL import Image

import export as export_command
import predict as predict_command
import test as test_command
import train as train_command
from datasets.registry import SPECS
from model.peers import unias
from model.step import TrainingStep
from utils import tracking
from utils.checkpoint import Checkpoint, load_checkpoint
from utils.cli import run_command
from utils.errors import CheckpointError
from utils.layers import MODELS
from utils.runs import locked

SMALL = [
    "--category", "part", "--backbone", TINY, "--precision", "fp32", "--device", "cpu",
    "--quiet",
    "--set", "data.image_size=64", "--weights", "random", "--set", "model.width=0.25",
    "--set", "train.batch_size=4", "--save-every", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _each_step_in_the_log(monkeypatch):
    monkeypatch.setattr(tracking, "LOG_EVERY", 1)


@pytest.fixture
def run(mvtec_like, tmp_path, capfd):
    """Run train.py in this process; gives (exit code, stdout, stderr)."""

    def call(*flags, command=train_command, base=True):
        argv = ["--data-root", str(mvtec_like), "--output", str(tmp_path / "runs"), *SMALL] if base else []
        code = run_command(command.main, [*argv, *flags])
        return code, *capfd.readouterr()

    return call


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def the_run(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "runs").glob("*/*/*/*/metrics.json")
    return found.parent


def test_training_time_counts_no_saving(run, tmp_path, monkeypatch):
    """A state's units are measured before it is written; a clock stands still but for that."""
    plain, clock = train_command.fit_score, SimpleNamespace(now=0.0)

    def slow(*words):
        clock.now += 1000
        plain(*words)

    monkeypatch.setattr(train_command, "fit_score", slow)
    monkeypatch.setattr(train_command, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    code, *_ = run("--model", "remind", "--iterations", "6")
    assert code == 0 and clock.now == 3000  # steps 2, 4 and the end
    assert metrics(the_run(tmp_path))["timing"]["train_s"] == 0


def test_uninet_is_told_which_images_show_a_synthetic_defect(run, monkeypatch):
    """Else its losses take all of them for normal: anomaly_source is label."""
    plain, seen = TrainingStep.__call__, []

    def watched(step, batch):
        seen.append((batch["label"].tolist(), batch["mask"].flatten(1).any(dim=1).tolist()))
        return plain(step, batch)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    assert run("--iterations", "4", "--eval", "none", "--set", "data.synthetic=0.5")[0] == 0
    assert all(labels == masked for labels, masked in seen)
    assert {label for labels, _ in seen for label in labels} == {0, 1}


def test_the_loop_gives_batches_as_the_settings_say(run, monkeypatch):
    """An epoch of twelve images in fives, the last batch kept; augmentation is told each image's category."""
    augment_batch, seen = train_command.augment_batch, []

    def watched(batch, config, step, categories):
        seen.append((batch["index"].tolist(), list(categories)))
        return augment_batch(batch, config, step, categories)

    monkeypatch.setattr(train_command, "augment_batch", watched)
    flags = ("--config", "configs/folder.yaml", "--eval", "none", "--set", "model.width=0.25")
    settings = (
        "train.batch_size=5",
        "train.last_batch=keep",
        "train.epochs=1",
        "data.calibration_fraction=0",
    )
    assert run(*flags, *(word for setting in settings for word in ("--set", setting)))[0] == 0
    assert sorted(i for batch, _ in seen for i in batch) == list(range(12))
    assert [categories for _, categories in seen] == [["part"] * n for n in (5, 5, 2)]


class TestNumbersComeBeforePictures:
    BANK = ("--config", "configs/folder.yaml", "--model", "memory-bank")

    def test_a_category_without_an_anomalous_pixel(self, real_plots, run, mvtec_like, tmp_path):
        """The crop leaves nothing of any defect."""
        extra = ("--extra-metrics", "aupimo", "dsc_unias", "--set", "data.center_crop=8")
        code, out, err = run(*self.BANK, *extra)
        assert code == 0 and "I-AUROC" in out and "P-AUROC" not in out and "not complete" not in err, err
        folder = the_run(tmp_path)
        found = metrics(folder)["results"]["part"]
        assert found["image_auroc"] is not None and found["pro"] is found["pixel_ap"] is None
        assert "PRO, area" not in (folder / "report.html").read_text()
        tested = ["--checkpoint", str(folder), "--protocol", "april-2025", "--quiet"]
        assert run_command(test_command.main, tested) == 0
        assert (folder / "test/report.html").is_file()

    def test_a_report_that_fails(self, run, tmp_path, monkeypatch):
        def fails(*_):
            assert list((tmp_path / "runs").rglob("metrics.json"))
            raise ValueError("no page")

        monkeypatch.setattr("evaluation.report.page", fails)
        code, out, err = run(*self.BANK)
        assert code == 0 and "I-AUROC" in out and err.count("\n") == 1
        assert "report.html" in err and "not complete (ValueError: no page)" in err
        folder = the_run(tmp_path)
        assert (folder / "scores.csv").is_file() and not (folder / "report.html").exists()
        assert run_command(test_command.main, ["--checkpoint", str(folder), "--quiet"]) == 0
        assert (folder / "test/metrics.json").is_file() and (folder / "test/scores.csv").is_file()


class TestFilesOfARun:
    @pytest.mark.parametrize("flavor", ["paper", "released"])
    def test_uninet(self, run, tmp_path, flavor):
        code, out, err = run("--iterations", "3", "--flavor", flavor, "--set", "eval.every=2")
        assert code == 0 and "I-AUROC" in out and err == ""
        folder = the_run(tmp_path)
        assert folder.relative_to(tmp_path / "runs").parts[:3] == ("mvtec", "one-class", "part")
        assert folder.name.startswith(f"uninet-{flavor}-{TINY}-") and folder.name.endswith("-s0")
        found = metrics(folder)
        assert set(found["results"]) == {"part", "mean"} and found["format"] == 1
        assert found["results"]["part"]["n_normal"] == 4 and found["results"]["part"]["n_anomalous"] == 5
        assert found["protocol"]["select"] == "last" and found["protocol"]["across_images"] == "none"
        assert found["protocol"]["image_size"] == [64, 64] and found["parameters"] > 1e5
        assert {"train_s", "s_per_iteration", "ms_per_image", "peak_memory_gb"} <= set(found["timing"])
        rows = list(csv.DictReader((folder / "scores.csv").open()))
        assert len(rows) == 9 and list(rows[0]) == ["path", "category", "label", "defect", "score"]
        assert rows[0]["path"] == "part/test/dot/8.bmp"
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [x["iteration"] for x in lines if "kd" in x] == [1, 2, 3]
        assert all(np.isfinite([x["kd"], x["sc"], x["m"], x["total"]]).all() for x in lines if "kd" in x)
        assert [x["iteration"] for x in lines if x.get("split") == "validation"] == [2]
        assert [x["iteration"] for x in found["curve"]] == [2]
        assert list(folder.glob("events.out*"))
        assert Image.open(folder / "heatmaps.png").size[0] > 100
        assert "part: ROC" in (folder / "report.html").read_text()
        state = torch.load(folder / "last.pt", weights_only=True)
        assert state["iteration"] == 3 and state["optimizer"] is None

    @pytest.mark.parametrize(
        ("model", "part"),
        [("recontrast", "source"), pytest.param("unias", "mse", marks=pytest.mark.slow)],
    )
    def test_other_models(self, run, tmp_path, monkeypatch, model, part):
        for constant, value in SMALL_UNIAS.items():
            monkeypatch.setattr(unias, constant, value)
        code, out, err = run("--model", model, "--setting", "one-class", "--iterations", "2")
        assert code == 0 and "I-AUROC" in out, err
        folder = the_run(tmp_path)
        assert folder.name.startswith(f"{model}-default-{TINY}-")
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert all(np.isfinite(line[part]) for line in lines if "total" in line)
        code, _, err = run("--checkpoint", str(folder), "--quiet", command=test_command, base=False)
        assert code == 0, err
        again = metrics(folder / "test")["results"]["part"]
        assert again["pixel_auroc"] == pytest.approx(
            metrics(folder)["results"]["part"]["pixel_auroc"], abs=1e-3
        )

    def test_memory_bank(self, run, tmp_path):
        code, out, _ = run("--model", "memory-bank", "--backbone", LITE0, "--set", "model.weights=null")
        assert code == 0
        result = metrics(the_run(tmp_path))["results"]["part"]
        assert result["image_auroc"] > 0.9 and result["pixel_auroc"] > 0.9  # a bright square on stripes

    def test_curves_in_tensorboard(self, run, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        run("--iterations", "2", "--set", "eval.every=2")
        events = EventAccumulator(str(the_run(tmp_path))).Reload()
        tags = events.Tags()
        wanted = {f"loss/{name}" for name in ("kd", "sc", "m", "total")} | {"lr/student", "lr/teacher"}
        wanted |= {"validation/part/image_auroc", "test/part/image_auroc"}
        wanted |= {f"theta/stride{s}/{name}" for s in (4, 8, 16) for name in ("min", "mean", "max")}
        wanted |= {f"diagonal/stride{s}/{name}" for s in (4, 8, 16) for name in ("normal", "highest")}
        assert wanted <= set(tags["scalars"]) and "diagonal/stride4/anomalous" not in tags["scalars"]
        last = {name: events.Scalars(name)[-1].value for name in wanted}
        assert 1 / 256 < last["diagonal/stride4/normal"] * 2 < 2 * last["diagonal/stride4/highest"]
        assert {"validation/heatmaps", "test/heatmaps"} <= set(tags["images"])

    def test_validation_is_a_block_of_its_own(self, run, tmp_path, monkeypatch):
        lines, real = [], train_command.describe
        monkeypatch.setattr(train_command, "describe", lambda *given: lines.append(real(*given)) or lines[0])
        code, out, _ = run(
            "--iterations", "1", "--eval", "validation", "--set", "data.validation_fraction=0.3"
        )
        assert code == 0 and "evaluated on: validation" in out
        assert "8 training and 8 validation images" in lines[0]
        found = metrics(the_run(tmp_path))
        assert found["protocol"]["evaluated_on"] == "validation"
        assert found["results"]["part"]["n_normal"] == found["results"]["part"]["n_anomalous"] == 4

    def test_select_best_says_that_it_peeked(self, run, tmp_path):
        code, out, _ = run("--iterations", "3", "--select", "best", "--set", "eval.every=1")
        assert code == 0 and "NOT A FAIR PROTOCOL" in out
        assert metrics(the_run(tmp_path))["protocol"]["fair"] is False

    def test_select_best_needs_both_kinds(self, run, mvtec_like):
        for kind in (mvtec_like / "part/test").iterdir():
            if kind.name != "good":
                shutil.rmtree(kind)
        flags = ("--iterations", "1", "--select", "best", "--set", "eval.every=1")
        code, _, lines = run("--config", str(ROOT / "configs/folder.yaml"), *flags)
        assert code == 2 and "--select best needs test images of both kinds" in "".join(lines)

    def test_last_never_sees_the_test_set_before_the_end(self, run, monkeypatch):
        """With --select last and no evaluation asked for, no test image is opened before the last step."""
        from datasets.transforms import Decode

        opened, real_image, real_finish = [], Decode.image, train_command.finish
        monkeypatch.setattr(Decode, "image", lambda self, path: opened.append(path) or real_image(self, path))
        seen = []
        monkeypatch.setattr(
            train_command,
            "finish",
            lambda *a: seen.append([p for p in opened if "/test/" in str(p)]) or real_finish(*a),
        )
        assert run("--iterations", "2", "--set", "eval.every=1")[0] == 0
        assert seen == [[]] and any("/test/" in str(p) for p in opened)

    def test_all_categories_give_one_table(self, run, mvtec_like, tmp_path):
        import shutil

        shutil.copytree(mvtec_like / "part", mvtec_like / "other")
        code, out, _ = run("--iterations", "1", "--category", "all")
        assert code == 0 and "part" in out and "other" in out and "mean" in out
        assert len(list((tmp_path / "runs").glob("*/*/*/*/metrics.json"))) == 2

    def test_multi_class(self, run, mvtec_like, tmp_path):
        import shutil

        shutil.copytree(mvtec_like / "part", mvtec_like / "other")
        flags = ("--iterations", "1", "--category", "all", "--setting", "multi-class")
        assert run(*flags)[0] == 0
        assert set(metrics(the_run(tmp_path))["results"]) == {"part", "other", "mean"}


class TestSameCommandSameResult:
    def test_twice(self, run, tmp_path):
        flags = ("--iterations", "3", "--name", "a")
        run(*flags)
        first = metrics(the_run(tmp_path))
        assert run(*flags, "--overwrite")[0] == 0
        second = metrics(the_run(tmp_path))
        assert first["results"] == second["results"]

    @pytest.mark.slow
    def test_seed_changes_it(self, run, tmp_path):
        run("--iterations", "2")
        run("--iterations", "2", "--seed", "1")
        a, b = (load_checkpoint(p).model for p in sorted((tmp_path / "runs").glob("*/*/*/*/last.pt")))
        assert not torch.equal(a["student.heads.0.weight"], b["student.heads.0.weight"])

    def test_a_finished_run_is_reused(self, run, tmp_path):
        run("--iterations", "2")
        before = (the_run(tmp_path) / "last.pt").stat().st_mtime_ns
        code, out, _ = run("--iterations", "2")
        assert code == 0 and "I-AUROC" in out
        assert (the_run(tmp_path) / "last.pt").stat().st_mtime_ns == before

    def test_shuffling_the_test_set_changes_no_metric(self, run, tmp_path, monkeypatch):
        import random

        import datasets.build

        run("--iterations", "2")
        fair = metrics(the_run(tmp_path))["results"]["part"]
        real = datasets.build.collect

        def shuffled(*args, **options):
            samples = real(*args, **options)
            random.Random(3).shuffle(samples)
            return samples

        monkeypatch.setattr("datasets.build.collect", shuffled)
        out = tmp_path / "shuffled"
        code, *_ = run(
            "--checkpoint",
            str(the_run(tmp_path)),
            "--quiet",
            "--output",
            str(out),
            command=test_command,
            base=False,
        )
        assert code == 0
        for name, value in metrics(out)["results"]["part"].items():
            assert value == pytest.approx(
                fair[name], abs=2e-3 if "pixel" in name or "pro" in name else 1e-9
            ), name


class TestResume:
    @pytest.mark.parametrize(  # memory-bank: tests/test_runs.py
        "model", ["uninet", "recontrast", pytest.param("unias", marks=pytest.mark.slow)]
    )
    def test_interrupted_equals_undisturbed(self, run, tmp_path, monkeypatch, model):
        for name, value in {"D": 32, "G": 4, "FFN": 64, "NEIGHBOURS": 3}.items():
            monkeypatch.setattr(unias, name, value)
        flags = ("--model", model, "--setting", "one-class", "--iterations", "4")
        flags += () if model == "uninet" else ("--eval", "none")
        run(*flags, "--name", "whole")
        real, calls = train_command.stop_if_not_finite, []

        def interrupt(*args):
            real(*args)
            calls.append(args[3])
            if len(calls) == 4:  # in step 3; the last checkpoint is that of step 2
                raise KeyboardInterrupt

        monkeypatch.setattr(train_command, "stop_if_not_finite", interrupt)
        code, _, err = run(*flags, "--name", "broken")
        assert code == 1 and "--resume goes on from there" in err
        monkeypatch.setattr(train_command, "stop_if_not_finite", real)
        code, _, err = run(*flags, "--name", "broken")
        assert code == 1 and "--resume goes on" in err
        folder = tmp_path / "runs/mvtec/one-class/part"
        if model == "uninet":  # an older version's backbones ended in stages that nothing reads
            state = load_checkpoint(folder / "broken/last.pt")
            state.model["teachers.target.blocks.9.0.conv.weight"] = torch.ones(1)
            state.optimizer["param_groups"][-1]["params"] += [10**6, 10**6 + 1]
            state.save(folder / "broken/last.pt")
        assert run(*flags, "--name", "broken", "--resume")[0] == 0
        a, b = (load_checkpoint(folder / name / "last.pt").model for name in ("whole", "broken"))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert metrics(folder / "whole")["results"] == metrics(folder / "broken")["results"]

    def test_a_run_of_other_settings_is_not_gone_on_with(self, run, monkeypatch):
        """That is said; a first run says nothing, nor does one that is there."""
        said = []
        monkeypatch.setattr(train_command.cli.log, "info", lambda text, *args: said.append(text % args))
        for steps, told in (("1", False), ("2", True), ("1", False)):
            assert run("--iterations", steps, "--resume")[0] == 0
            about = [x for x in said if x.endswith("have other settings")]
            assert bool(about) is told and all("one-class/part/uninet-" in x for x in about)
            said.clear()

    def test_kill(self, mvtec_like, tmp_path):
        """A process killed outright leaves a checkpoint that loads, and the run goes on from it."""
        flags = ["--data-root", str(mvtec_like), "--output", str(tmp_path), *SMALL]
        process = processes.start("train.py", *flags, "--iterations", "400", "--name", "k")
        path = tmp_path / "mvtec/one-class/part/k/last.pt"
        for _ in range(3000):
            if path.is_file() or process.poll() is not None:
                break
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
        step = load_checkpoint(path).iteration
        assert step % 2 == 0 and step > 0
        log = (path.parent / "log.jsonl").read_text().splitlines()
        assert json.loads(log[0])["iteration"] == 1

    def test_a_folder_in_use_is_not_written_to(self, run, tmp_path):
        with locked(tmp_path / "runs/mvtec/one-class/part/busy"):
            code, _, err = run("--iterations", "1", "--name", "busy")
        assert code == 1 and "in use by another process" in err


class TestTestCommand:
    def test_same_numbers_as_training_and_both_protocols(self, run, tmp_path):
        run("--iterations", "3", "--flavor", "released")
        folder = the_run(tmp_path)
        flags = ("--checkpoint", str(folder), "--protocol", "april-2025", "--save-maps", "--quiet")
        code, out, _ = run(*flags, command=test_command, base=False)
        assert code == 0 and out.count("I-AUROC") == 2 and "NOT A FAIR PROTOCOL" in out
        fair, trained = metrics(folder / "test")["results"]["part"], metrics(folder)["results"]["part"]
        for name, value in trained.items():
            assert fair[name] == pytest.approx(value, abs=2e-3), name  # folded batch norms round differently
        april = metrics(folder / "test/april-2025")
        assert (
            "not a fair protocol" in april["protocol"]["across_images"] and april["protocol"]["fair"] is False
        )
        assert april["results"]["part"]["pixel_auroc"] == fair["pixel_auroc"]
        maps = sorted((folder / "test/maps").rglob("*.tiff"))
        assert len(maps) == 9 and np.asarray(Image.open(maps[0])).dtype == np.float32
        rows = csv.DictReader((folder / "test/scores.csv").open())
        named = {Path(row["path"]).with_suffix(".tiff") for row in rows}
        assert {path.relative_to(folder / "test/maps") for path in maps} == named

    @pytest.mark.slow
    def test_scored_in_fp32_whatever_trained_in(self, run, tmp_path):
        run("--iterations", "1", "--precision", "bf16", "--backbone", LITE0, "--set", "model.width=0.5")
        folder = the_run(tmp_path)

        def scores(path: Path) -> np.ndarray:
            return np.array([float(row["score"]) for row in csv.DictReader(path.open())])

        trained, found = scores(folder / "scores.csv"), {}
        for precision in ("fp32", "bf16"):
            flags = ("--checkpoint", str(folder), "--quiet", "--output", str(tmp_path / precision))
            chosen = ("--precision", precision) if precision == "bf16" else ()
            assert run(*flags, *chosen, command=test_command, base=False)[0] == 0
            found[precision] = scores(tmp_path / precision / "scores.csv")
            assert metrics(tmp_path / precision)["protocol"]["scored_in"] == precision
        np.testing.assert_allclose(found["fp32"], trained, rtol=1e-4)
        assert abs(found["bf16"] / trained - 1).max() > 1e-3  # the test can tell them apart
        protocol = metrics(folder)["protocol"]
        assert (protocol["precision"], protocol["scored_in"]) == ("bf16", "fp32")

    def test_mistakes(self, run, tmp_path):
        code, _, err = run("--checkpoint", str(tmp_path / "none"), command=test_command, base=False)
        assert code == 1 and "no checkpoint at" in err and "Traceback" not in err
        (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 truncated")
        code, _, err = run("--checkpoint", str(tmp_path / "bad.pt"), command=test_command, base=False)
        assert code == 1 and "damaged" in err


class TestMistakes:
    @pytest.mark.parametrize(("flags", "code", "message"), [
        (("--set", "loss.temprature=1"), 2, "did you mean 'loss.temperature'"),
        (("--set", "iterations"), 2, "has no '='"),
        (("--select", "best"), 2, "eval.every 0 evaluates nothing in a training of"),
        (("--iterations", "2", "--set", "eval.every=5"), 2, "5 evaluates nothing in a training of 2 steps"),
        (("--model", "memory-bank", "--set", "eval.every=5"), 2, "nothing in a training of 0 steps"),
        (("--iterations", "2", "--set", "train.epochs=2"), 2, "both given; a run has one length"),
        (("--category", "nothing"), 1, "no category 'nothing'"),
        (("--config", "configs/none.yaml"), 2, "no config file at"),
        (("--device", "gpu"), 1, "choose auto, cpu, cuda"),
        (("--backbone", "resnet_nothing"), 1, "unknown backbone"),
    ])  # fmt: skip
    def test_one_line_and_the_exit_code(self, run, flags, code, message):
        found, _, err = run(*flags)
        assert found == code and message in err and err.startswith("error: ") and err.count("\n") == 1
        assert "Traceback" not in err

    def test_a_loss_that_is_no_number_stops_the_run(self, run, tmp_path, monkeypatch):
        from model.uninet import UniNet

        real = UniNet.loss

        def poisoned(self, batch, progress):
            return {k: v * float("nan") for k, v in real(self, batch, progress).items()}

        monkeypatch.setattr(UniNet, "loss", poisoned)
        code, _, err = run("--iterations", "2")
        assert code == 1 and "not finite at step 0" in err and ".jpg" in err
        assert not list((tmp_path / "runs").rglob("metrics.json"))

    def test_argparse_exits_with_two(self):
        call = processes.run("train.py", "--flavour")
        assert call.returncode == 2 and "usage" in call.stderr

    def test_list(self, run):
        code, out, _ = run("--list")
        assert code == 0 and "tf_efficientnet_lite0" in out and "released" in out
        for name, spec in SPECS.items():
            (line,) = (x for x in out.splitlines() if x.split()[:1] == [name])
            assert all(category in line for category in spec.counts)
        assert all(any(x.split()[:1] == [model] for x in out.splitlines()) for model in MODELS)

    def test_help_has_groups_and_defaults(self, capsys):
        with pytest.raises(SystemExit):
            train_command.parse_arguments(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "where results go:" in text and "(default: checkpoints)" in text
        assert "(default: the config's)" in text and "base.yaml:" not in text

    def test_bars_are_silent_where_there_is_no_terminal(self, run):
        code, _, err = run("--model", "memory-bank", "--eval", "none")
        assert code == 0 and err == ""


@pytest.mark.parametrize("command", [train_command, test_command, predict_command, export_command])
def test_help_says_each_default_once_and_in_one_way(command, capsys, monkeypatch):
    """What test.py and predict.py take from a run, base.yaml has no say in."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        command.parse_arguments(["--help"])
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if "default" in line]
    assert told and all(line.count("default") == 1 and "(default: " in line for line in told)
    assert command is train_command or not any("base.yaml" in line for line in told)


class TestCheckpoints:
    def test_a_kill_while_writing_keeps_the_old_file(self, tmp_path):
        from utils.files import write_atomically

        path = tmp_path / "x.pt"
        path.write_text("old")

        def dies(file):
            file.write(b"half of the new")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, dies)
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]

    def test_a_pickle_is_not_executed(self, tmp_path):
        import pickle

        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))

        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"format": 1, "model": Evil()}))
        torch.save({"format": 1, "model": Evil()}, tmp_path / "evil2.pt")
        for name in ("evil.pt", "evil2.pt"):
            with pytest.raises(CheckpointError, match="nothing of it was run"):
                load_checkpoint(tmp_path / name)
        assert not (tmp_path / "executed").exists()

    def test_settings_younger_than_the_file_take_their_base_value(self, tmp_path, make_config):
        config = make_config(model__width=0.5)
        Checkpoint(config, {}, 1).save(tmp_path / "old.pt")
        tree = torch.load(tmp_path / "old.pt", weights_only=True)
        del tree["config"]["data"]["tile"], tree["config"]["loss"]["hard_ratio"]
        torch.save(tree, tmp_path / "old.pt")
        assert load_checkpoint(tmp_path / "old.pt").config == config
        tree["config"]["loss"]["no_longer_there"] = 1
        torch.save(tree, tmp_path / "old.pt")
        with pytest.raises(CheckpointError, match=r"another version.*loss.no_longer_there"):
            load_checkpoint(tmp_path / "old.pt")

    def test_a_file_of_format_1(self, tmp_path):
        torch.save({"format": 1, "config": {}, "model": {}, "iteration": 1}, tmp_path / "old.pt")
        with pytest.raises(CheckpointError, match=r"by v0\.1\.0 \(commit 4a74ab6\); check that commit"):
            load_checkpoint(tmp_path / "old.pt")

    def test_foreign_files(self, tmp_path):
        torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
        with pytest.raises(CheckpointError, match="no checkpoint of format 2"):
            load_checkpoint(tmp_path / "foreign.pt")
