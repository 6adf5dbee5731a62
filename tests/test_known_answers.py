"""Answers worked out by hand for single lines that decide results: a changed line changes the number."""

import csv
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY
from fixtures import COUNTS
from scipy.ndimage import gaussian_filter1d
from sklearn.metrics import roc_auc_score
from torch import nn

import train as train_command
from datasets.build import list_samples, split_samples
from datasets.loader import ImageSet
from datasets.registry import SPECS
from datasets.samples import Sample
from datasets.splits import limit
from datasets.transforms import Decode, Normalise
from evaluation.metrics_by_task import frame_metrics
from evaluation.published_protocol import april_results
from evaluation.results import write_scores
from evaluation.scoring import Scores, calibrate, results_by_category
from losses.supervised import supervised_loss
from losses.uninet import Pair, uninet_loss
from model import build_model
from model.backbone import PINNED, BackboneInfo
from model.decision import Decision
from model.detector import Calibration
from model.peers.memory_bank import MemoryBank, coreset, nearest, patches_of
from model.peers.unias import reconstruction_loss
from utils.checkpoint import Checkpoint, load_checkpoint, restore_model, training_state
from utils.cli import run_command
from utils.errors import DatasetError
from utils.optim import make_optimizer, rate_at
from utils.runs import earlier
from utils.yaml_io import CONFIGS, read_yaml

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def sample(label=0, category="a", defect="", group="g", name="x.png"):
    return Sample(ROOT / name, label, None, category, "test", defect, group)


# --- decision -----------------------------------------------------------------------------------------------


class TestDecision:
    def decide(self, **changes):
        released = {"decision": "weighted-distance", "alpha": 0.01, "beta": 3e-5}
        return Decision(**released | {"score_sigma": 0.0, "map_sigma": 0.0} | changes)

    def test_released_share_follows_the_largest_distance(self):
        """Highest distance 1.505: 0.01 x 1.505 of 10,000 pixels, so the mean of the 150 largest."""
        ramp = (torch.arange(10_000, dtype=torch.float32) / 9_999 * 1.505).view(1, 100, 100)
        found = self.decide()([ramp], (100, 100), highest=2)
        assert found.score.item() == pytest.approx(1.505 * (1 - 74.5 / 9_999), rel=1e-6)

    def test_a_heads_score_is_added_by_its_weight(self):
        found = self.decide(decision="max", head_weight=0.5)(
            [torch.full((2, 4, 4), 2.0)], (4, 4), head_score=torch.tensor([1.0, 0.0])
        )
        assert found.score.tolist() == [2.5, 2.0]

    def test_mean_is_of_all_pixels(self):
        found = self.decide(decision="mean")([torch.arange(16.0).view(1, 4, 4)], (4, 4))
        assert found.score.item() == 7.5


# --- what is learnt from ------------------------------------------------------------------------------------


def test_a_limit_is_random_and_follows_the_seed():
    samples = list(range(100))
    few = limit(samples, 10, seed=0)
    assert few == sorted(few) and few != samples[:10] != limit(samples, 10, seed=1) != few


class TestSplits:
    def test_anomalies_of_held_out_items_are_not_trained_on(self, masters, make_config, monkeypatch):
        """KolektorSDD has normal and anomalous parts of one item; whole items are calibrated on."""
        monkeypatch.setitem(SPECS, "kolektor", replace(SPECS["kolektor"], counts=COUNTS["kolektor"]))
        config = make_config(
            "configs/kolektor.yaml",
            run__data_root=str(masters["kolektor"]),
            data__num_train_anomalies=2,
            model__setting="supervised",
        )
        everything = split_samples(config).train
        mixed = {s.group for s in everything if s.label == 1} & {s.group for s in everything if s.label == 0}
        assert mixed  # such items are there
        found = set()
        for seed in range(8):
            settings = replace(config.data, calibration_fraction=0.1)
            parts = split_samples(replace(config, data=settings, train=replace(config.train, seed=seed)))
            held = {s.group for s in parts.calibration}
            assert held and not held & {s.group for s in parts.train}
            found |= held & mixed
        assert found  # one of them was drawn

    def test_readable_images_must_suffice(self, mvtec_like, make_config):
        for path in (mvtec_like / "part/test/good").iterdir():
            path.write_bytes(b"text")
        config = make_config(run__data_root=str(mvtec_like), data__category="part", run__skip_unreadable=True)
        with pytest.raises(DatasetError, match="no normal test image found"):
            list_samples(config)


# --- checkpoints --------------------------------------------------------------------------------------------


class TestResume:
    def saved(self, path, config):
        model = nn.Linear(2, 1)
        groups = [{"name": "student", "params": list(model.parameters()), "lr": 0.1}]
        optimizer, schedule = make_optimizer(groups, config)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
        state = training_state(optimizer, schedule)
        Checkpoint(config, model.state_dict(), 7, seconds=12.5, **state).save(path)
        return model, optimizer, schedule

    def test_all_of_a_runs_state_comes_back(self, tmp_path, make_config):
        config = make_config(optim__warmup=4)
        model, optimizer, schedule = self.saved(tmp_path / "a.pt", config)
        expected = torch.rand(3)  # what comes next in the run that is not interrupted
        weight, rate = model.weight.detach().clone(), optimizer.param_groups[0]["lr"]
        torch.manual_seed(99)
        other, fresh, again = self.saved(tmp_path / "b.pt", config)
        fresh.state.clear()
        again.step()
        found = load_checkpoint(tmp_path / "a.pt")
        restore_model(other, found.model, source=tmp_path / "a.pt")
        found.resume(fresh, again)
        assert (found.iteration, found.seconds) == (7, 12.5)
        assert torch.equal(torch.rand(3), expected) and torch.equal(other.weight, weight)
        moments = [o.state[m.weight]["exp_avg"] for o, m in ((optimizer, model), (fresh, other))]
        assert torch.equal(*moments) and moments[0].abs().sum() > 0
        assert again.last_epoch == 1 and fresh.param_groups[0]["lr"] == rate == pytest.approx(0.05)

    def test_nothing_to_resume(self, tmp_path):
        assert earlier(tmp_path, {}, resume=True) == (None, None, None)


def test_overwriting_leaves_nothing_of_the_old_run(mvtec_like, tmp_path, capfd):
    """An old best.pt of a higher value would be restored at the end of the new run."""
    flags = ["--data-root", str(mvtec_like), "--category", "part", "--output", str(tmp_path), "--name", "r"]
    flags += ["--model", "memory-bank", "--backbone", TINY, "--device", "cpu", "--quiet", "--eval", "none"]
    flags += ["--weights", "random", "--set", "data.image_size=64"]
    assert run_command(train_command.main, flags) == 0
    (folder,) = tmp_path.glob("mvtec/*/part/r")
    state = load_checkpoint(folder / "last.pt")
    Checkpoint(state.config, state.model, 1, value=9.0).save(folder / "best.pt")
    assert run_command(train_command.main, [*flags, "--overwrite"]) == 0
    assert not (folder / "best.pt").exists() and (folder / "last.pt").is_file()


class TestSelectBest:
    def looked(self, make_config, tmp_path, monkeypatch, means):
        config = make_config(eval__select="best", eval__every=1)
        model = nn.Linear(1, 1, bias=False)
        data = SimpleNamespace(evaluated=lambda split: split, trained_defects=frozenset())
        run = train_command.Run(config, tmp_path, data, model, torch.device("cpu"), True, "", {}, None, None)
        asked, measured = [], []
        monkeypatch.setattr(train_command, "fit_score", measured.append)
        monkeypatch.setattr(train_command, "score", lambda run, data: asked.append(data) or "scores")
        monkeypatch.setattr(train_command, "example_page", lambda *args: None)
        monkeypatch.setattr(
            train_command, "results_by_category", lambda *args: {"mean": means[len(asked) - 1]}
        )
        tracker = SimpleNamespace(evaluation=lambda *args, **more: None, note=lambda text: None)
        for step in range(1, len(means) + 1):
            nn.init.constant_(model.weight, step)
            train_command.evaluate_during_training(run, tracker, step)
        assert asked == ["test"] * len(means) and measured == [run] * len(means)
        return load_checkpoint(tmp_path / train_command.BEST)

    def test_the_highest_is_kept_the_first_of_equals(self, make_config, tmp_path, monkeypatch):
        means = [{"pro": value, "image_auroc": 1 - value} for value in (0.2, 0.9, 0.5, 0.9)]
        kept = self.looked(make_config, tmp_path, monkeypatch, means)
        assert (kept.iteration, kept.value, kept.model["weight"].item()) == (2, 0.9, 2)

    def test_dice_decides_where_there_is_one(self, make_config, tmp_path, monkeypatch):
        means = [{"dsc": 0.5, "pro": 0.1}, {"dsc": 0.4, "pro": 0.9}]
        assert self.looked(make_config, tmp_path, monkeypatch, means).iteration == 1

    def test_images_decide_without_masks(self, make_config, tmp_path, monkeypatch):
        means = [{"pro": None, "image_auroc": 0.6}, {"pro": None, "image_auroc": 0.7}]
        assert self.looked(make_config, tmp_path, monkeypatch, means).iteration == 2


# --- evaluation ---------------------------------------------------------------------------------------------


def test_april_protocol_smooths_scores_within_each_category(make_config):
    rng = np.random.default_rng(0)
    labels = np.tile(np.repeat([1, 0], 30), 2)
    score = rng.normal(size=120) + labels
    samples = [sample(int(y), "ab"[i // 60]) for i, y in enumerate(labels)]
    scores = Scores(samples, score, np.zeros((120, 1, 1), np.float32), None, 1.0)
    found = april_results(scores, make_config())
    for name, part in (("a", slice(0, 60)), ("b", slice(60, 120))):
        smoothed = gaussian_filter1d(score[part], 4)
        assert found[name]["image_auroc"] == pytest.approx(roc_auc_score(labels[part], smoothed))
        assert found[name]["image_auroc"] != pytest.approx(roc_auc_score(labels[part], score[part]), abs=0.02)
    both = [found[name]["image_auroc"] for name in "ab"]
    assert found["mean"]["image_auroc"] == pytest.approx(np.mean(both))


def test_a_p_value_of_the_rate_is_flagged(tmp_path):
    scores = Scores([sample()] * 3, np.arange(3.0), np.zeros((3, 1, 1)), None, 1.0)
    write_scores(tmp_path / "s.csv", scores, None, p_values=np.array([0.05, 0.25, 0.25001]), rate=0.25)
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert [row["is_anomalous"] for row in rows] == ["1", "1", "0"]


class TestCalibration:
    def test_colours_end_at_twice_the_distance_to_the_999th_thousandth(self):
        maps = np.arange(1001, dtype=np.float32).reshape(1, 7, 143)
        found = calibrate(Scores([sample()], np.array([3.0]), maps, None, 1.0))
        assert (found.scores, found.low, found.high) == ((3.0,), 500.0, 500.0 + 2 * 499.0)
        assert found.pixel_level == 999.0

    def test_p_values_by_hand(self):
        """Of normals 1, 2, 2, 4: as anomalous as 2 are three and the image itself, so 4 of 5."""
        found = Calibration((4.0, 2.0, 1.0, 2.0), 0.0, 1.0)
        assert found.p_values(np.array([0.5, 2.0, 3.0, 4.0, 5.0])).tolist() == [1, 0.8, 0.4, 0.4, 0.2]
        assert found.smallest_rate() == 0.2


def test_clip_scores_are_smoothed_by_sigma(make_config):
    rng = np.random.default_rng(0)
    labels = np.tile(np.repeat([0, 1], 20), 2)
    score = rng.normal(size=80) + labels
    samples = [sample(int(y), group="pq"[i // 40]) for i, y in enumerate(labels)]
    scores = Scores(samples, score, np.zeros((80, 1, 1), np.float32), None, 1.0, kind="video")
    clips = ["pq"[i // 40] for i in range(80)]
    for sigma, found in (
        (4.0, results_by_category(scores, make_config().run)["a"]),
        (6.0, frame_metrics(score, labels, clips, sigma=6.0)),
    ):
        smoothed = np.concatenate(
            [gaussian_filter1d(score[:40], sigma), gaussian_filter1d(score[40:], sigma)]
        )
        assert found["frame_auroc_micro_smoothed"] == pytest.approx(roc_auc_score(labels, smoothed))


# --- optimiser ----------------------------------------------------------------------------------------------


class TestOptimiser:
    def optimizer(self, config, value=2.0):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, value)
        groups = [{"name": "student", "params": [model.weight], "lr": config.optim.lr}]
        return model.weight, *make_optimizer(groups, config)

    def test_weights_decay(self, make_config):
        """Without a gradient a step multiplies a weight by 1 - rate x decay."""
        weight, optimizer, _ = self.optimizer(make_config(optim__lr=0.5, optim__weight_decay=0.1))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert weight.item() == pytest.approx(2 * (1 - 0.5 * 0.1))

    @pytest.mark.parametrize("preset", ["one-class", "multi-class"])
    def test_presets(self, make_config, preset):
        """After a gradient of 1 one of 0.1: AMSGrad divides by the larger of both second moments."""
        config = make_config(optim__preset=preset, optim__lr=0.1, optim__weight_decay=0.0)
        weight, optimizer, _ = self.optimizer(config)
        expected, m, v, largest, eps = 2.0, 0.0, 0.0, 0.0, 1e-8 if preset == "one-class" else 1e-10
        for step, gradient in enumerate([1.0, 1e-4, 1e-9, 0.0], start=1):
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            largest = max(largest, v)
            second = largest if preset == "multi-class" else v
            expected -= 0.1 * (m / (1 - 0.9**step)) / ((second / (1 - 0.999**step)) ** 0.5 + eps)
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
            assert weight.item() == pytest.approx(expected, rel=1e-6), step
        group = optimizer.param_groups[0]
        assert (group["eps"], group["amsgrad"]) == (eps, preset == "multi-class")

    def test_schedules(self, make_config):
        """100 iterations; the factor on the rate at some of them."""
        expected = {
            "constant": {0: 1, 50: 1, 99: 1},
            "step": {0: 1, 79: 1, 80: 0.2, 99: 0.2},
            "tenth": {39: 1, 40: 0.1, 79: 0.1, 80: 0.01},
            "cosine": {0: 1, 50: 0.5, 25: (1 + 0.5**0.5) / 2},
        }
        for name, factors in expected.items():
            config = make_config(optim__schedule=name, train__iterations=100)
            for step, factor in factors.items():
                assert rate_at(step, config) == pytest.approx(factor), (name, step)
        warm = make_config(optim__schedule="cosine", optim__warmup=20, train__iterations=100)
        found = [rate_at(step, warm) for step in (0, 9, 19, 20, 60)]
        assert found == pytest.approx([0.05, 0.5, 1, 1, 0.5])


def test_gradients_are_clipped(mvtec_like, tmp_path, monkeypatch, capfd):
    """What the optimiser is given has the length that is allowed."""
    norms, real = [], train_command.make_optimizer

    def watched(groups, config):
        optimizer, schedule = real(groups, config)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(
                float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
            )
        )
        return optimizer, schedule

    monkeypatch.setattr(train_command, "make_optimizer", watched)
    flags = ["--data-root", str(mvtec_like), "--category", "part", "--output", str(tmp_path), "--quiet"]
    flags += ["--backbone", TINY, "--device", "cpu", "--precision", "fp32", "--eval", "none"]
    flags += ["--iterations", "1", "--set", "train.batch_size=2", "--set", "model.width=0.25"]
    flags += ["--weights", "random", "--set", "data.image_size=64"]
    assert run_command(train_command.main, [*flags, "--set", "optim.grad_clip=1e-3"]) == 0
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert run_command(train_command.main, flags) == 0
    assert norms[1] > 1e-2  # not clipped


# --- models -------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A backbone whose features are told: what it is given, pooled."""

    def forward(self, images):
        return [nn.functional.avg_pool2d(images, stride) for stride in (4, 8, 16)]


def bank(make_config, fraction=1.0):
    config = make_config(model__name="memory-bank", model__bank_fraction=fraction)
    info = BackboneInfo("x", (3, 3, 3), (4, 8, 16), (0.5,) * 3, (0.5,) * 3, signed=True, image_size=(64, 64))
    score = replace(config.score, decision="max", score_sigma=0.0, map_sigma=0.0)
    return MemoryBank(Given(), info, replace(config, score=score))


class TestMemoryBank:
    def test_the_nearest_of_all_parts(self, make_config, monkeypatch):
        monkeypatch.setattr("model.peers.memory_bank.ROWS", 2)
        stored = torch.tensor([[9.0, 0], [3, 0], [7, 0], [1, 4], [50, 0]])
        found = nearest(torch.tensor([[[[0.0, 0], [8, 0], [1, 1]]]]), stored)
        assert found.shape == (1, 1, 3) and found.flatten().tolist() == pytest.approx([3, 1, 5**0.5])

    def test_a_coreset_covers_all(self):
        """Greedy: of four tight clusters of points one each, and each next point is the farthest."""
        centres = 100 * torch.eye(4, 6)
        noise = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        points = centres.repeat(10, 1) + noise
        chosen = coreset(points, 4, rare=0, seed=0)
        assert sorted(chosen.argmax(dim=1).tolist()) == [0, 1, 2, 3]
        assert all((points == x).all(dim=1).any() for x in chosen)
        three = coreset(points, 3, rare=0, seed=0)
        assert torch.equal(chosen[0], points[0]) and torch.equal(three, chosen[:3])
        whole = coreset(points, 100, rare=0, seed=0)
        assert sorted(map(tuple, whole.tolist())) == sorted(map(tuple, points.tolist()))

    def test_a_coreset_leaves_out_what_few_others_are_like(self):
        """Of four clusters and two odd points that are alike, as patches of one image's defect are."""
        noise = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
        usual = 100 * torch.eye(4, 6).repeat(25, 1) + noise
        points = torch.cat([usual[:50], torch.full((2, 6), 300.0), usual[50:]])
        assert (coreset(points, 5, rare=0, seed=0) == 300).all(dim=1).sum() == 1
        chosen = coreset(points, 200, rare=0.02, seed=0)
        assert sorted(map(tuple, chosen.tolist())) == sorted(map(tuple, usual.tolist()))
        assert len(coreset(points, 200, rare=0.1, seed=0)) == 92
        # one patch stays, and of patches that are all equal as many as of others
        assert torch.equal(coreset(points[:1], 5, rare=0.02, seed=0), points[:1])
        assert len(coreset(torch.ones(60, 6), 60, rare=0.02, seed=0)) == 59

    def test_the_coresets_next_patch_is_the_farthest(self, monkeypatch):
        """Against a dense search; as many projections as dimensions keep the order of far points."""
        points = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).double()
        monkeypatch.setattr(torch, "randn", lambda *size, generator: torch.eye(*size))
        chosen = coreset(points, 12, rare=0, seed=0)
        for i in range(1, 12):
            far = torch.cdist(points, chosen[:i]).amin(dim=1)
            assert torch.equal(points[far.argmax()], chosen[i])

    def test_what_it_was_fitted_on_has_distance_zero_and_a_shift_its_length(self, make_config):
        model, images = bank(make_config), torch.randn(2, 3, 64, 64)
        model.fit([images], seed=0)
        assert len(model.bank) == 2 * 8 * 8
        assert model.predict(images).score.max() < 2e-3
        flat = torch.ones(1, 3, 128, 128)
        model.fit([flat], seed=0)
        middle = model.predict(flat + 2).anomaly_map[0, 48:80, 48:80]
        # six channels, each off by 2 (3 x 3 averages fall off at the border alone)
        assert torch.allclose(middle, torch.tensor(24.0).sqrt(), atol=1e-4)

    def test_patches_are_both_levels_averaged_and_brought_to_one_size(self, make_config):
        """OpenCV resizes as align_corners=False does."""
        images = torch.randn(1, 3, 64, 64)
        fine, coarse = (
            nn.functional.avg_pool2d(images, s)[0].permute(1, 2, 0).double().numpy() for s in (8, 16)
        )
        fine, coarse = (cv2.blur(f, (3, 3), borderType=cv2.BORDER_CONSTANT) for f in (fine, coarse))
        expected = np.concatenate([fine, cv2.resize(coarse, (8, 8), interpolation=cv2.INTER_LINEAR)], axis=2)
        found = patches_of(Given()(images))
        np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-6)

    def test_an_empty_bank_is_told_and_a_stored_one_comes_back(self, make_config):
        fitted, fresh, images = bank(make_config), bank(make_config), torch.randn(2, 3, 64, 64)
        with pytest.raises(RuntimeError, match="the memory bank is empty"):
            fresh.predict(images)
        fitted.fit([images], seed=0)
        fresh.load_state_dict(fitted.state_dict())
        assert torch.equal(fresh.predict(images + 1).score, fitted.predict(images + 1).score)
        assert not fresh.train().training  # nothing of it is trained

    def test_a_random_share_by_the_seed(self, make_config):
        images = torch.randn(2, 3, 64, 64)
        banks = []
        for seed in (0, 0, 1):
            model = bank(make_config, fraction=0.25)
            model.fit([images], seed=seed)
            banks.append(model.bank)
        everything = patches_of(Given()(images)).flatten(0, 2)
        assert len(banks[0]) == 32 and torch.equal(banks[0], banks[1])
        assert not torch.equal(banks[0], banks[2]) and not torch.equal(banks[0], everything[:32])
        rows = {tuple(row) for row in everything.tolist()}
        assert {tuple(row) for row in banks[0].tolist()} <= rows and len(banks[0].unique(dim=0)) == 32


def test_weights_of_the_papers_backbone_are_torchvisions_first():
    pinned = timm.get_pretrained_cfg(PINNED["wide_resnet50_2"])
    assert pinned.tag == "tv_in1k" and "95faca4d" in (pinned.url or "95faca4d")


class TestSettingsOfModels:
    def test_features_have_the_standard_deviation_asked_for(self, make_config):
        config = make_config(model__feature_gain=0.25, model__width=0.25)
        model, images = build_model(config).eval(), torch.randn(4, 3, 64, 64)
        model.fit_statistics([images])
        with torch.no_grad():
            source, _ = model.teachers(images)
        for feature in source:
            spread = feature.std((0, 2, 3), correction=0)
            assert spread[spread > 0.2].tolist() == pytest.approx(
                [0.25] * int((spread > 0.2).sum()), rel=1e-3
            )
            assert (spread > 0.2).float().mean() > 0.9  # all but dead channels

    @pytest.mark.parametrize(("teacher_bn", "moves"), [("train", True), ("eval", False)])
    def test_batch_norms_of_the_target_teacher(self, make_config, teacher_bn, moves):
        model = build_model(make_config(model__teacher_bn=teacher_bn, model__width=0.25)).train()
        state = {k: v.clone() for k, v in model.teachers.state_dict().items() if k.endswith("running_mean")}
        images = torch.randn(2, 3, 64, 64)
        model.teachers(images)
        after = model.teachers.state_dict()
        moved = {k.split(".")[0] for k, v in state.items() if not torch.equal(after[k], v)}
        assert moved == ({"target"} if moves else set())
        # and so, in eval, both teachers are equal at the start, whatever else is in the batch
        source, target = model.teachers(images)
        assert torch.equal(source[-1], target[-1]) is not moves

    def test_each_half_has_outputs_of_its_own(self, make_config):
        """ReContrast: with the second half's convolutions at zero, what they restore is zero."""
        model = build_model(make_config(model__name="recontrast", model__width=0.25)).eval()
        for head in model.student.second_heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        with torch.no_grad():
            pairs = model.features(torch.randn(2, 3, 64, 64))
        assert [student.abs().sum() > 0 for *_, student in pairs] == [True] * 3 + [False] * 3
        single = build_model(make_config(model__width=0.25))
        assert len(single.student.second_heads) == 0

    def test_the_score_section_is_the_decision(self, make_config):
        config = make_config(model__width=0.25)
        decision = build_model(config).decision
        assert asdict(decision) == asdict(config.score) | {"score_map": "raw"}
        decision = replace(decision, score_map="legacy_exp")
        found = decision(
            [torch.tensor([[[0.0, 1.0]]])], (1, 2), factor=torch.full((1, 1, 2), 0.5)
        )  # the map is halved, and its lowest value has the highest score
        assert found.anomaly_map.tolist() == [[[0.0, 0.5]]]
        assert found.score.item() == pytest.approx(1 - np.exp(-0.5))

    def test_unias_multiplies_the_whole_loss(self):
        """Features (1, 0) and (0.6, 0.8): squared error 0.4, cosine 0.6 everywhere, two stages."""
        stages = [torch.zeros(2, 2, n, n) for n in (4, 2)]
        restored = [x.clone() for x in stages]
        for x, y in zip(stages, restored):
            x[:, 0], y[:, 0], y[:, 1] = 1, 0.6, 0.8
        parts = reconstruction_loss(stages, restored)
        found = [parts[name].item() for name in ("mse", "cosine", "total")]
        assert found == pytest.approx([0.8, 0.8, 10 * 1.6])


# --- losses -------------------------------------------------------------------------------------------------


class TestTotal:
    def test_levels_that_the_paper_divides_by(self, make_config):
        """Constant features: L_SC = log N and L_M = 1 - 1 / N; two pairs a level."""
        pairs = [Pair(torch.ones(1, 2, n, n), torch.ones(1, 2, n, n)) for n in (8, 4, 8, 4)]
        parts = uninet_loss(pairs, make_config(loss__reduction="paper").loss)
        assert parts["sc"].item() == pytest.approx(np.log(64 * 16), rel=1e-5)
        assert parts["m"].item() == pytest.approx(2 - 1 / 64 - 1 / 16, rel=1e-5)

    def test_what_is_selected_is_compared(self, make_config):
        teacher, student = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        config = make_config().loss
        same = uninet_loss([Pair(teacher, student, lambda student, teacher: 2 * teacher)] * 2, config)
        assert same["kd"].item() == pytest.approx(0, abs=1e-6) and not same["kd"].requires_grad
        assert uninet_loss([Pair(teacher, student)] * 2, config)["kd"].item() > 1


def test_structure_loss_of_one_wrong_pixel():
    """All pixels are surely right but one, which costs 30."""
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., :20] = 1
    sure = torch.where(mask > 0, 30.0, -30.0)
    sure[0, 0, 20, 19] = -30.0  # at the border, so of a large weight
    local = nn.functional.avg_pool2d(mask, 31, stride=1, padding=15)
    weight = 1 + 5 * (local - mask).abs()
    iou = (weight * (mask > 0) * (sure > 0)).sum() + 1, (weight * (mask > 0)).sum() + 1
    overlap = 1 - (iou[0] / iou[1]).item()
    assert supervised_loss([sure], mask, "structure").item() == pytest.approx(30 / 1600 + overlap, rel=1e-5)


def test_every_setting_is_set_by_a_test_or_a_configuration():
    """What neither does is an option that nobody would miss."""
    tree = read_yaml(CONFIGS / "base.yaml")

    def blocks(found):
        for key, value in found.items() if isinstance(found, dict) else ():
            if key in tree and isinstance(value, dict):
                yield from (f"{key}.{name}" for name in value)
            yield from blocks(value)

    known = {
        key for path in CONFIGS.rglob("*.yaml") if path.stem != "base" for key in blocks(read_yaml(path))
    }
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py")).replace("__", ".")
    names = {f"{section}.{name}" for section, keys in tree.items() for name in keys}
    assert not [name for name in names - known if not re.search(rf"\b{re.escape(name)}\b", text)]


def test_statistics_are_of_normal_images_spread_over_the_set(tmp_path):
    samples = [sample(i % 2, name=f"{i}.png") for i in range(400)]
    data = ImageSet(samples, Decode((8, 8)), NORMALISE)
    found = [int(s.path.stem) for s in train_command.statistics_sample(data).samples]
    assert len(found) == 64 and found[0] == 0 and found[-1] == 398 and all(i % 2 == 0 for i in found)
