"""Supervised, cross-dataset, polyp and video runs: what is trained on, tested on and reported."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from fixtures import COUNTS
from PIL import Image
from sklearn.metrics import roc_auc_score

import test as test_command
import train
from datasets.build import build_data, read_as
from datasets.loader import TrainingOrder
from datasets.registry import SPECS
from datasets.transforms import Decode, Normalise
from datasets.video import FrameSet
from evaluation.figures import clip_page
from evaluation.metrics_by_task import frame_metrics, segmentation_metrics
from evaluation.results import results_table
from evaluation.scoring import Scores
from utils.cli import run_command
from utils.errors import ConfigError, DatasetError
from utils.layers import config_file, load_config
from utils.yaml_io import CONFIGS

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SMALL = [
    "--backbone", TINY, "--device", "cpu", "--precision", "fp32", "--quiet",
    "--set", "data.image_size=64", "--weights", "random", "--set", "model.width=0.25",
    "--set", "train.batch_size=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    for name in ("vad", "kolektor", "clinicdb", "ped2", "btad", "visa"):
        monkeypatch.setitem(SPECS, name, replace(SPECS[name], counts=COUNTS[name]))


@pytest.fixture
def run(masters, tmp_path, capfd):
    """train.py on a layout in small; gives exit code, stdout, stderr."""

    def call(name, *flags, output="runs"):
        base = ["--dataset", name, "--data-root", str(masters[name])]
        code = run_command(train.main, [*base, "--output", str(tmp_path / output), *SMALL, *flags])
        return code, *capfd.readouterr()

    return call


def results_of(folder):
    (path,) = folder.glob("*/*/*/*/metrics.json")
    return json.loads(path.read_text())["results"]


def data_of(name, root, **settings):
    chosen = {"run.data_root": str(root), "data.image_size": 64, "model.backbone": TINY}
    config = load_config(config_file(name), chosen | {"data.name": name} | settings)
    return build_data(config, NORMALISE)


@pytest.mark.parametrize(("category", "names"), [("01", ["001"]), ("all", ["01", "1", "2"])])
def test_augmentation_of_a_category_that_is_none(masters, category, names):
    settings = {"data.augment_by_category": {name: ["hflip"] for name in names}, "data.category": category}
    with pytest.raises(ConfigError, match=r"names no category of btad: (001|1, 2), found: 01, "):
        data_of("btad", masters["btad"], **settings, **{"data.augment": "by-category"})
    settings["data.augment_by_category"] = {"01": ["hflip"]}
    assert len(data_of("btad", masters["btad"], **settings, **{"data.augment": "by-category"}).train)


class TestSupervised:
    def test_seen_and_unseen_defects_apart(self, run, tmp_path):
        code, out, err = run("vad", "--setting", "supervised", "--iterations", "2")
        assert code == 0, err
        results = results_of(tmp_path / "runs")
        counts = {name: (r["n_normal"], r["n_anomalous"]) for name, r in results.items()}
        assert counts == {"vad": (3, 3), "vad/seen": (3, 2), "vad/unseen": (3, 1), "mean": (3, 3)}
        assert "vad/unseen" in out and "mean" not in out
        code, out, _ = run("vad", "--iterations", "1", output="one-class")
        assert code == 0 and "vad/unseen" not in out

    def test_what_is_trained_on(self, masters):
        supervised = data_of("vad", masters["vad"], **{"model.setting": "supervised"})
        assert [s.label for s in supervised.train.samples].count(1) == 2
        assert supervised.trained_defects == {"bad"} and not supervised.train.has_masks
        assert data_of("vad", masters["vad"]).trained_defects == frozenset()
        with pytest.raises(DatasetError, match="vad lacks masks.*bad.*--set loss.anomaly_source=label$"):
            data_of("vad", masters["vad"], **{"model.setting": "supervised", "loss.anomaly_source": "mask"})

    def test_a_head_that_learns_masks_needs_them(self, masters):
        """Whatever tells the losses the anomalous positions; and what the message advises is accepted."""
        settings = {"model.setting": "supervised", "model.head": "mask", "loss.supervised": "dice"}
        with pytest.raises(DatasetError, match="vad lacks masks") as error:
            data_of("vad", masters["vad"], **settings, **{"loss.anomaly_source": "label"})
        advice = dict(part.split("=") for part in str(error.value).split("--set ")[1:])
        data_of("vad", masters["vad"], **settings | {key: value.strip() for key, value in advice.items()})
        with pytest.raises(DatasetError, match="vad lacks masks.*--setting one-class$"):
            data_of("vad", masters["vad"], **{"model.setting": "supervised", "model.name": "remind"})

    def test_moved_anomalies_leave_the_same_test_set_to_both_settings(self, masters):
        parts = []
        for setting in ("one-class", "supervised"):
            settings = {"model.setting": setting, "data.num_train_anomalies": 2}
            parts.append(data_of("kolektor", masters["kolektor"], **settings))
        one_class, supervised = parts
        assert [s.path for s in one_class.test.samples] == [s.path for s in supervised.test.samples]
        moved = [s for s in supervised.train.samples if s.label == 1]
        assert len(moved) >= 2 and all(s.label == 0 for s in one_class.train.samples)
        assert not {s.path for s in moved} & {s.path for s in supervised.test.samples}
        tested = {s.group for s in supervised.test.samples if s.label == 1}
        assert not {s.group for s in moved} & tested  # copies and commutators stay on one side
        assert all(s.mask_path is not None for s in moved)
        with pytest.raises(DatasetError, match="leaves no anomalous test image"):
            data_of("kolektor", masters["kolektor"], **{"data.num_train_anomalies": 50})

    def test_a_limit_that_leaves_no_anomaly(self, masters):
        """It would train as one-class in silence."""
        settings = {"model.setting": "supervised", "model.name": "remind", "data.num_train_anomalies": 2}
        assert data_of("kolektor", masters["kolektor"], **settings).trained_defects
        refused = 0
        for seed in range(3):
            few = settings | {"data.train_limit": 1, "train.seed": seed}
            try:
                assert data_of("kolektor", masters["kolektor"], **few).trained_defects
            except DatasetError as error:
                assert "no anomalous training image" in str(error) and "data.train_limit may" in str(error)
                refused += 1
        assert refused

    def test_the_same_images_are_left_out_afterwards(self, run, masters, tmp_path):
        code, _, err = run("kolektor", "--iterations", "1")
        assert code == 0, err
        folder = next((tmp_path / "runs").rglob("last.pt")).parent
        code = run_command(
            test_command.main, ["--checkpoint", str(folder), "--quiet", "--set", "data.num_train_anomalies=2"]
        )
        assert code == 0
        left = data_of("kolektor", masters["kolektor"], **{"data.num_train_anomalies": 2}).test.samples
        rows = (folder / "test" / "scores.csv").read_text().splitlines()[1:]
        assert len(rows) == len(left)

    def test_kolektor(self, run, tmp_path):
        code, _, err = run(
            "kolektor", "--setting", "supervised", "--iterations", "1", "--set", "data.num_train_anomalies=2"
        )
        assert code == 0, err
        assert list(results_of(tmp_path / "runs")) == ["kolektor", "mean"]  # one kind of defect: seen

    def test_nothing_to_learn_from(self, run):
        code, _, err = run("btad", "--setting", "supervised", "--category", "01")
        assert code == 1 and "has no anomalous training image for --setting supervised" in err
        code, _, err = run("vad", "--setting", "supervised", "--model", "memory-bank")
        assert code == 2 and "memory-bank learns from normal images" in err

    def test_held_out_items_stay_out(self, masters):
        settings = {"model.setting": "supervised", "data.num_train_anomalies": 2, "eval.split": "validation"}
        data = data_of("kolektor", masters["kolektor"], **settings, **{"data.validation_fraction": 0.3})
        held = {s.group for s in data.validation.samples}
        assert held and not held & {s.group for s in data.train.samples}

    def test_anomalous_images_are_drawn_more_often(self, masters):
        settings = {"model.setting": "supervised", "data.num_train_anomalies": 2}
        once, often = (
            data_of(
                "kolektor", masters["kolektor"], **settings, **{"data.anomaly_oversampling": n}
            ).train.samples
            for n in (1, 4)
        )
        drawn = {s.path: sum(o.path == s.path for o in often) for s in once}
        assert {drawn[s.path] for s in once if s.label == 1} == {4}
        assert {drawn[s.path] for s in once if s.label == 0} == {1}

    def test_validation_takes_real_defects_where_training_knows_some(self, masters):
        settings = {"model.setting": "supervised", "data.num_train_anomalies": 2, "eval.split": "validation"}
        kinds = {}
        for fraction in (0.1, 0.6):
            data = data_of(
                "kolektor", masters["kolektor"], **settings, **{"data.validation_fraction": fraction}
            )
            assert (
                {s.label for s in data.validation.samples} == {0, 1} == {s.label for s in data.train.samples}
            )
            kinds[fraction] = {s.defect for s in data.validation.samples if s.label == 1}
        assert kinds[0.6] == {"defect"}

    def test_the_moved_ones_do_not_depend_on_the_seed(self, masters):
        settings = {"model.setting": "supervised", "data.num_train_anomalies": 2}
        sets = [
            data_of("kolektor", masters["kolektor"], **settings, **{"train.seed": seed}).test.samples
            for seed in (0, 1, 2)
        ]
        assert sets[0] == sets[1] == sets[2]

    def test_no_normal_images(self, run):
        code, _, err = run("clinicdb", "--setting", "one-class", "--category", "random")
        assert code == 1 and "clinicdb has no normal training image; it is for --setting supervised" in err


class TestPolyps:
    def test_validation_is_that_of_the_split(self, run, tmp_path):
        flags = ("--category", "sequence", "--iterations", "2", "--eval", "validation")
        code, out, err = run("clinicdb", *flags)
        assert code == 0 and "DSC" in out and "I-AUROC" not in out, err
        assert results_of(tmp_path / "runs")["sequence"]["n_anomalous"] == 2

    @pytest.mark.slow
    def test_a_kill_in_the_middle_of_the_sizes(self, run, tmp_path, monkeypatch):
        flags = ["--category", "random", "--iterations", "5", "--save-every", "1"]
        assert run("clinicdb", *flags, output="whole")[0] == 0
        real, calls = train.stop_if_not_finite, []

        def stop_at_4(run_, parts, batch, step):
            calls.append(step)
            if step == 4:
                raise KeyboardInterrupt
            real(run_, parts, batch, step)

        monkeypatch.setattr(train, "stop_if_not_finite", stop_at_4)
        assert run("clinicdb", *flags, output="killed")[0] == 1 and calls[-1] == 4
        monkeypatch.setattr(train, "stop_if_not_finite", real)
        assert run("clinicdb", *flags, "--resume", output="killed")[0] == 0
        states = [
            torch.load(next((tmp_path / name).rglob("last.pt")), weights_only=True)["model"]
            for name in ("whole", "killed")
        ]
        assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())

    def test_each_batch_comes_at_every_size(self):
        order = list(TrainingOrder(7, 2, seed=0, start=0, stop=9, repeat=3))
        assert order[0] == order[1] == order[2] != order[3] == order[4]
        assert list(TrainingOrder(7, 2, seed=0, start=4, stop=9, repeat=3)) == order[4:]
        plain = list(TrainingOrder(7, 2, seed=0, start=0, stop=3))
        assert order[::3] == plain

    @pytest.mark.slow
    def test_epochs_count_every_size(self, run, tmp_path):
        code, _, err = run("clinicdb", "--category", "random", "--set", "train.epochs=2")
        assert code == 0, err
        (path,) = (tmp_path / "runs").glob("*/*/*/*/metrics.json")
        assert json.loads(path.read_text())["protocol"]["iterations"] == 15  # 2 x 5 / 2 batches, 3 sizes


class TestSegmentationMetrics:
    def test_known_answer(self):
        masks = np.zeros((2, 4, 4), np.uint8)
        masks[0, :2], masks[1, 0, :2] = 1, 1
        maps = np.zeros((2, 4, 4))
        maps[0, 1:3], maps[1, 0, 0] = 0.9, 0.51  # 4 of 8 found with 4 too many; 1 of 2 found
        found = segmentation_metrics(maps, masks)
        assert found["dsc"] == pytest.approx((0.5 + 2 / 3) / 2)
        assert found["miou"] == pytest.approx((1 / 3 + 1 / 2) / 2)

    def test_half_is_not_foreground_and_empty_matches_empty(self):
        empty = np.zeros((1, 4, 4), np.uint8)
        assert segmentation_metrics(np.full((1, 4, 4), 0.5), empty) == {"dsc": 1, "miou": 1}
        assert segmentation_metrics(np.full((1, 4, 4), 0.6), empty) == {"dsc": 0, "miou": 0}

    def test_soft_is_stretched_and_not_thresholded(self):
        rng = np.random.default_rng(0)
        p, g = rng.random((3, 5, 6)) * 0.3 + 0.2, (rng.random((3, 5, 6)) > 0.5).astype(np.uint8)
        dice, iou = [], []
        for a, b in zip(p, g):
            a = (a - a.min()) / (a.max() - a.min())
            both, total = (a * b).sum(), a.sum() + b.sum()
            dice.append((2 * both + 1) / (total + 1))
            iou.append((both + 1) / (total - both + 1))
        found = segmentation_metrics(p, g, soft=True)
        assert found["dsc"] == pytest.approx(np.mean(dice)) and found["miou"] == pytest.approx(np.mean(iou))
        scaled = segmentation_metrics(p * 0.1, g, soft=True)
        assert scaled["dsc"] == pytest.approx(found["dsc"])

    def test_order_and_mistakes(self):
        rng = np.random.default_rng(0)
        p, g = rng.random((6, 5, 6)), (rng.random((6, 5, 6)) > 0.5).astype(np.uint8)
        order = rng.permutation(6)
        assert segmentation_metrics(p[order], g[order])["dsc"] == pytest.approx(
            segmentation_metrics(p, g)["dsc"]
        )
        with pytest.raises(ValueError, match="in \\[0, 1\\]"):
            segmentation_metrics(p * 3, g)


class TestVideo:
    def test_frames_are_of_the_clip(self, masters):
        data = data_of("ped2", masters["ped2"], **{"model.head": "frame", "data.frame_offset": 2}).train
        assert isinstance(data, FrameSet) and data.earlier == [0, 0, 0, 1, 4, 4, 4, 5]
        batch = data.__getitems__([3, 4])
        image = Decode((64, 64)).image
        for place, (earlier, now) in enumerate(((1, 3), (4, 4))):
            for k, i in enumerate((earlier, now)):
                expected = NORMALISE(image(data.samples[i].path)[None])[0]
                torch.testing.assert_close(batch["frames"][place, k], expected)

    def test_known_answer(self):
        labels = np.array([0, 0, 1, 1, 0, 1, 1, 1])
        scores = np.array([0.1, 0.2, 0.3, 0.4, 0.8, 0.9, 0.5, 0.6])
        clips = ["a"] * 4 + ["b"] * 2 + ["c"] * 2  # c has one class only
        found = frame_metrics(scores, labels, clips, sigma=0)
        assert found["frame_auroc_micro"] == pytest.approx(roc_auc_score(labels, scores))
        assert found["frame_auroc_macro"] == found["frame_auroc_macro_smoothed"] == 1
        assert found["frame_auroc_micro"] == pytest.approx(11 / 15)

    def test_smoothing_stays_within_a_clip(self):
        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1, 0, 1], 20)
        scores = rng.normal(size=80) + 2 * labels
        clips = np.repeat(["a", "b"], 40).tolist()
        found = frame_metrics(scores, labels, clips, sigma=4)
        assert found["frame_auroc_micro_smoothed"] > found["frame_auroc_micro"]
        swapped = np.r_[40:80, 0:40]  # the clips in another order
        again = frame_metrics(scores[swapped], labels[swapped], [clips[i] for i in swapped], sigma=4)
        assert again == pytest.approx(found)

    def test_one_class_only(self):
        found = frame_metrics(np.arange(3.0), np.zeros(3, int), ["a"] * 3, sigma=4)
        assert set(found.values()) == {None}

    def test_run_and_picture(self, run, tmp_path):
        code, out, err = run("ped2", "--iterations", "2")
        assert code == 0 and "micro~" in out and "smoothed within each clip" in out, err
        (picture,) = (tmp_path / "runs").rglob("clips.png")
        assert Image.open(picture).size[0] == 2 * 320  # a panel per clip
        code, _, err = run("ped2", "--iterations", "1", "--eval", "validation", output="other")
        assert code == 2 and "ped2 has no validation images" in err
        for key in ("train_limit", "num_train_anomalies"):
            code, _, err = run("ped2", "--set", f"data.{key}=3", output="other")
            assert code == 2 and "leave gaps between frames" in err

    def test_memory_bank_sees_single_frames(self, run, tmp_path):
        code, out, err = run("ped2", "--model", "memory-bank", "--set", "data.train_limit=3")
        assert code == 0 and "micro" in out, err

    def test_curves_show_anomalous_frames(self, masters):
        samples = data_of("ped2", masters["ped2"]).test.samples
        scores = Scores(samples, np.arange(8.0), np.zeros((8, 4, 4), np.float32), None, 1.0, kind="video")
        page = clip_page(scores)
        shaded = (page == (255, 214, 204)).all(axis=2)
        left, right = np.array_split(shaded, 2, axis=1)  # a panel for each of two clips
        assert left.any() and right.any() and 0.1 < shaded.mean() < 0.9

    def test_damaged_intervals(self, masters, tmp_path):
        root = shutil.copytree(masters["ped2"], tmp_path / "ped2")
        (root / "Test/UCSDped2.m").write_text("TestVideoFile = {};")
        with pytest.raises(DatasetError, match="has 0 intervals for 2 test clips"):
            data_of("ped2", root)
        (root / "Test/UCSDped2.m").unlink()
        with pytest.raises(DatasetError, match=r"does not look like ped2: expected .*Test/UCSDped2.m"):
            data_of("ped2", root)


class TestCrossDataset:
    """A finished run on another dataset, by test.py --dataset."""

    @pytest.mark.slow
    def test_results_and_images_that_were_trained_on(self, run, masters, tmp_path, capfd):
        assert run("btad", "--category", "01", "--iterations", "1", "--eval", "none")[0] == 0
        (folder,) = (tmp_path / "runs").glob("btad/one-class/01/*")

        def tested(name, root, *flags):
            words = ["--checkpoint", str(folder), "--dataset", name, "--data-root", str(root), *flags]
            return run_command(test_command.main, ["--quiet", "--overwrite", *words])

        assert tested("visa", masters["visa"], "--category", "pcb1") == 0
        written = json.loads((folder / "test/metrics.json").read_text())
        assert list(written["results"]) == ["pcb1", "mean"] and written["results"]["pcb1"]["n_anomalous"] == 3
        assert written["protocol"]["image_size"] == [256, 256]  # visa's, not the run's 64
        assert written["protocol"]["center_crop"] is None
        assert tested("mvtec3d", masters["mvtec3d"], "--category", "dowel") == 0
        protocol = json.loads((folder / "test/metrics.json").read_text())["protocol"]
        assert (protocol["resize"], protocol["center_crop"]) == ("bilinear", 256)
        root = shutil.copytree(masters["vad"], tmp_path / "vad")
        shutil.copy(next((masters["btad"] / "01/train/ok").glob("0*")), root / "test/good/000.png")
        assert tested("vad", root) == 1
        assert "is the same file as" in capfd.readouterr().err

    def test_its_own_size_crop_and_filter(self):
        def read(name, category="all", **settings):
            config = load_config(
                CONFIGS / "btad.yaml", {"data.image_size": 64, "model.backbone": TINY} | settings
            )
            return read_as(name, category, config)

        assert read("kolektor").image_size == (640, 256)
        assert (read("mvtec3d").center_crop, read("mvtec3d", "cable_gland").center_crop) == (None, 256)
        for flavor, resize in (("paper", "bilinear"), ("released", "lanczos")):
            assert read("vad", **{"model.flavor": flavor}).resize == resize
        for share in (0, 0.25):  # which decides whether the model has a head
            assert read("vad", **{"model.name": "remind", "data.synthetic": share}).synthetic == share


class TestTestCommand:
    def command(self, *flags):
        return run_command(test_command.main, ["--quiet", "--overwrite", *flags])

    def test_seen_defects_are_those_of_the_run(self, run, masters, tmp_path, capfd):
        flags = ("--setting", "supervised", "--iterations", "1", "--set", "data.num_train_anomalies=2")
        assert run("kolektor", *flags)[0] == 0
        (folder,) = (tmp_path / "runs").glob("kolektor/supervised/kolektor/*")
        vad = ("--checkpoint", str(folder), "--dataset", "vad", "--data-root", str(masters["vad"]))
        assert self.command(*vad) == 0
        assert list(json.loads((folder / "test/metrics.json").read_text())["results"]) == ["vad", "mean"]

    def test_another_split_of_the_same_images_is_refused(self, run, masters, tmp_path, capfd):
        root = shutil.copytree(masters["clinicdb"], tmp_path / "clinicdb")
        trained = next(p for p in (root / "random/train/images").iterdir() if p.suffix == ".jpg")
        shutil.copy(trained, next((root / "sequence/test/images").glob("0*.jpg")))
        flags = ["--dataset", "clinicdb", "--data-root", str(root), *SMALL]
        flags += ["--output", str(tmp_path / "r"), "--category", "random", "--iterations", "1"]
        assert run_command(train.main, flags) == 0
        (folder,) = (tmp_path / "r").glob("*/*/random/*")
        assert self.command("--checkpoint", str(folder)) == 0
        assert self.command("--checkpoint", str(folder), "--category", "sequence") == 1
        assert "is the same file as" in capfd.readouterr().err

    def test_training_images_that_moved_to_the_test_set_are_told(self, mvtec_like, tmp_path, capfd):
        root = shutil.copytree(mvtec_like, tmp_path / "copy")
        flags = ["--dataset", "folder", "--data-root", str(root), *SMALL, "--model", "memory-bank"]
        assert run_command(train.main, [*flags, "--output", str(tmp_path / "r"), "--name", "r"]) == 0
        (folder,) = (tmp_path / "r").glob("*/*/*/r")
        assert self.command("--checkpoint", str(folder)) == 0
        assert "no longer" not in capfd.readouterr().err
        for path in sorted((root / "part/train/good").iterdir())[:4]:
            path.rename(root / "part/test/good" / f"new-{path.name}")
        assert self.command("--checkpoint", str(folder)) == 0
        assert f"the training images are no longer those at {root}" in capfd.readouterr().err

    def test_unfair_numbers_stay_unfair(self, run, masters, tmp_path, capfd):
        best = ("--select", "best", "--set", "eval.every=1")
        assert run("btad", "--category", "01", "--iterations", "1", *best)[0] == 0
        (folder,) = (tmp_path / "runs").glob("btad/one-class/01/*")
        assert self.command("--checkpoint", str(folder)) == 0
        assert "NOT A FAIR PROTOCOL" in capfd.readouterr().out
        assert json.loads((folder / "test/metrics.json").read_text())["protocol"]["fair"] is False
        assert self.command("--checkpoint", str(folder), "--set", "eval.select=last") == 2
        assert self.command("--checkpoint", str(folder), "--set", "score.blur_size=4") == 2
        assert "must be odd" in capfd.readouterr().err  # what train.py refuses
        assert self.command("--checkpoint", str(folder), "--set", "score.head_weight=2") == 0
        assert "score.head_weight changes nothing with model.head none" in capfd.readouterr().err

    @pytest.mark.slow
    def test_soft_dice_says_so(self, run, masters, tmp_path, capfd):
        assert run("clinicdb", "--category", "random", "--iterations", "1")[0] == 0
        (folder,) = (tmp_path / "runs").glob("clinicdb/supervised/random/*")
        assert self.command("--checkpoint", str(folder), "--protocol", "april-2025") == 0
        hard = json.loads((folder / "test/metrics.json").read_text())
        april = json.loads((folder / "test/april-2025/metrics.json").read_text())
        assert hard["protocol"]["fair"] and not april["protocol"]["fair"]
        assert "DSC†" not in capfd.readouterr().out
        assert self.command("--checkpoint", str(folder), "--extra-metrics", "soft_dsc") == 0
        assert "mIoU†" in (out := capfd.readouterr().out) and "† not a fair protocol" in out
        both = json.loads((folder / "test/metrics.json").read_text())["results"]["random"]
        for name in ("dsc", "miou"):
            assert hard["results"]["random"][name] == both[name] != both[f"{name}_soft"]
            assert april["results"]["random"][name] == both[f"{name}_soft"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("dataset", "flag", "message"),
        [
            ("ped2", "data.augment=flip-rotate", "are for single images"),
            ("ped2", "train.scales=[0.75,1.0]", "are for single images"),
            ("btad", "train.scales=[]", "train.scales is empty"),
            ("btad", "train.epochs=0", "train.epochs is 0"),
            ("btad", "data.image_size=72", "must be multiples of 32"),
            ("btad", "data.name=foo", "unknown dataset 'foo'"),
        ],
    )
    def test_one_line(self, run, dataset, flag, message):
        code, _, err = run(dataset, "--category", "all", "--set", flag)
        assert code in (1, 2) and message in err and err.count("\n") == 1

    def test_predict_with_a_model_of_frame_pairs(self, run, masters, tmp_path, capfd):
        import predict

        assert run("ped2", "--iterations", "1")[0] == 0
        (folder,) = (tmp_path / "runs").glob("ped2/one-class/ped2/*")
        image = next((masters["ped2"] / "Test/Test001").glob("*.tif"))
        assert run_command(predict.main, ["--checkpoint", str(folder), str(image), "--quiet"]) == 2
        assert "predict.py reads single images" in capfd.readouterr().err


class TestScoreSettingsWithoutTraining:
    @pytest.mark.slow
    def test_decision_of_a_trained_model(self, run, masters, tmp_path, capfd):
        assert run("btad", "--category", "01", "--iterations", "1")[0] == 0
        (folder,) = (tmp_path / "runs").glob("btad/one-class/01/*")

        def scored(*flags):
            argv = ["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--quiet", *flags]
            code = run_command(test_command.main, [*argv, "--overwrite"])
            return code, (tmp_path / "out/scores.csv").read_text() if code == 0 else capfd.readouterr().err

        plain, same, other = (
            scored(),
            scored("--set", "score.beta=0.03"),
            scored("--set", "score.decision=max"),
        )
        assert plain == same != other and other[0] == 0
        protocol = json.loads((tmp_path / "out/metrics.json").read_text())["protocol"]
        assert protocol["score"]["decision"] == "max"
        code, err = scored("--set", "model.width=2")
        assert code == 2 and "a trained model has that fixed" in err


def test_columns_without_values_are_left_out():
    table = results_table({"x": {"dsc": 0.5, "image_auroc": None}, "mean": {"dsc": 0.5}})
    assert "DSC" in table and "I-AUROC" not in table and "50.00" in table and "*" not in table


def test_feature_statistics_are_of_all_categories_and_of_normal_images(masters):
    data = data_of("vad", masters["vad"], **{"model.setting": "supervised"}).train
    assert [s.label for s in train.statistics_sample(data).samples] == [0] * 6
    polyps = data_of("clinicdb", masters["clinicdb"], **{"data.category": "random"}).train
    assert len(train.statistics_sample(polyps)) == 5
    many = data_of("btad", masters["btad"]).train
    many.samples = many.samples * 20
    found = [s.category for s in train.statistics_sample(many).samples]
    assert len(found) == 64 and 24 <= found.count("01") <= 40
