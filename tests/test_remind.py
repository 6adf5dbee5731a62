"""ReMIND: hardest positions, focal loss, discrimination head, one teacher, synthetic sets."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from torch.nn import functional as F

import train as train_command
from datasets.build import build_data, validation_kinds
from datasets.industrial import MVTEC
from datasets.loader import ImageSet, TrainingOrder, training_batches
from datasets.registry import collect
from datasets.synthetic import SyntheticTraining
from datasets.transforms import Decode, Normalise, augment_batch, degraded
from losses.kd import hardest_distance
from losses.similarity import unmasked_positions
from losses.supervised import focal_loss
from model import build_model, remind
from model.decision import Decision, distance_map
from model.heads import DiscriminationHead
from model.peers.memory_bank import nearest, patches_of, placed, sample_patches
from model.remind import REPAIR, SECOND_RATE
from model.step import TrainingStep
from utils.checkpoint import load_checkpoint
from utils.cli import run_command
from utils.errors import ConfigError
from utils.optim import make_optimizer

NORMALISE = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def batch():
    mask = torch.zeros(4, 1, 64, 64)
    mask[2:, :, 10:30, 20:40] = 1
    return {"image": torch.randn(4, 3, 64, 64), "label": torch.tensor([0, 0, 1, 1]), "mask": mask}


def restored(model, images):
    """What its head reads: a teacher's features, and what the student restores of them."""
    return model.restored(model.teacher(images), images)


class TestHardestPositions:
    def pair(self):
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(2, 5, 6, 7, dtype=torch.float64, generator=generator) for _ in range(2))

    @pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
    def test_mean_of_the_largest(self, share):
        teacher, student = self.pair()
        student.requires_grad_()
        distance = 1 - F.cosine_similarity(teacher, student, dim=1)
        ranked = sorted(distance.flatten().tolist(), reverse=True)
        count = math.ceil(share * 84)
        found = hardest_distance(teacher, student, torch.ones(2, 42, dtype=torch.bool), share)
        assert found.item() == pytest.approx(sum(ranked[:count]) / count, abs=1e-9)
        found.backward()
        moved = (student.grad.abs().sum(1) > 0).flatten()
        assert moved.sum() == count and set(distance.flatten()[moved].tolist()) == set(ranked[:count])

    def test_of_normal_positions_alone(self):
        teacher, student = self.pair()
        normal = torch.zeros(2, 42, dtype=torch.bool)
        normal[0, :10] = True
        distance = (1 - F.cosine_similarity(teacher, student, dim=1))[0].flatten()[:10]
        found = hardest_distance(teacher, student, normal, 0.2)
        assert found.item() == pytest.approx(distance.topk(2).values.mean().item(), abs=1e-9)
        assert hardest_distance(teacher, student, torch.zeros_like(normal), 0.2) == 0

    def test_anomalous_positions_get_no_gradient(self):
        teacher, student = self.pair()
        normal = torch.rand(2, 42, generator=torch.Generator().manual_seed(5)) < 0.5
        student.requires_grad_()
        value = hardest_distance(teacher, student, normal, 1.0)
        value.backward()
        assert (student.grad.flatten(2).abs().sum(1) > 0).equal(normal)
        each = 1 - F.cosine_similarity(teacher, student, dim=1).flatten(1)[normal]
        assert value.item() == pytest.approx(each.mean().item(), abs=1e-12)

    @pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.15, 0.55), (0.3, 0.1), (1.0, 0.1)])
    def test_share_falls_in_a_line(self, make_config, batch, progress, share):
        model = build_model(make_config(model__name="remind", model__width=0.5)).eval()
        pairs = list(zip(*restored(model, batch["image"]), strict=True))
        normal = [unmasked_positions(t.shape[2:], batch["mask"]) for t, _ in pairs]
        expected = sum(hardest_distance(t, s, n, share) for (t, s), n in zip(pairs, normal, strict=True))
        torch.testing.assert_close(model.loss(batch, progress)["kd"], expected)


def test_focal_loss_against_loops():
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 1, 5, 4)), np.zeros((3, 1, 5, 4))
    mask[1, 0, 2:4, 1:] = 1  # the others are normal, so Dice is of one image
    total = 0.0
    for x, y in zip(logits.ravel(), mask.ravel(), strict=True):
        p = 1 / (1 + math.exp(-x))
        p = p if y else 1 - p
        total -= (1 - p) ** 2 * math.log(p)
    p = 1 / (1 + np.exp(-logits[1]))
    dice = 1 - (2 * (p * mask[1]).sum() + 1) / (p.sum() + mask[1].sum() + 1)
    found = focal_loss(torch.tensor(logits), torch.tensor(mask))
    assert found.item() == pytest.approx(10 * total / 60 + dice, abs=1e-12)
    normal = focal_loss(torch.tensor(logits[[0, 2]]), torch.zeros(2, 1, 5, 4))
    assert torch.isfinite(normal) and normal < found


class TestDiscriminationHead:
    def test_what_it_sees_sums_to_the_cosine(self):
        """With mixing weights 1 / C each level adds its cosine, brought to the finest size."""
        head = DiscriminationHead((4, 6), width=1)
        for mix in head.mix:
            torch.nn.init.constant_(mix.weight, 1 / mix.in_channels)
        teachers, students = ([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)] for _ in range(2))
        seen = []
        head.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        assert head(teachers, students).shape == (2, 1, 8, 8)
        fine, coarse = (
            F.cosine_similarity(t, s, dim=1)[:, None] for t, s in zip(teachers, students, strict=True)
        )
        coarse = F.interpolate(coarse, size=(8, 8), mode="bilinear", align_corners=False)
        torch.testing.assert_close(seen[0], fine + coarse)

    def test_scale_of_the_features_does_not_matter(self):
        head = DiscriminationHead((4, 6)).eval()
        teachers, students = ([torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)] for _ in range(2))
        torch.testing.assert_close(head(teachers, students), head([7 * t for t in teachers], students))


class TestModel:
    @pytest.fixture
    def model(self, make_config):
        settings = {"model__width": 0.5, "model__bank_fraction": 0}
        return build_model(make_config(model__name="remind", **settings))

    def test_one_teacher(self, model, batch, make_config):
        teacher, student = restored(model, batch["image"])
        assert [t.shape for t in teacher] == [s.shape for s in student] and len(teacher) == 3
        (group,) = model.parameter_groups(make_config().optim)
        assert {id(p) for p in group["params"]}.isdisjoint(id(p) for p in model.teacher.parameters())
        assert not model.train().teacher.training and model.student.training
        parts = model.loss(batch, 0.5)
        torch.testing.assert_close(parts["total"], parts["kd"] + parts["head"])

    def test_the_head_leaves_the_student_as_it_is(self, model, batch):
        model.train().loss(batch, 0.5)["head"].backward()
        assert all(p.grad is None for part in (model.student, model.bottleneck) for p in part.parameters())
        assert all(p.grad.abs().sum() > 0 for p in model.head.parameters())

    def test_the_student_restores_what_was_there(self, model, batch):
        """Beside L_KD: the mean distance from the clean image's features, where the two images differ."""
        clean = batch["image"].clone()
        changed = batch | {"image": torch.where(batch["mask"] == 1, -clean, clean), "clean": clean}
        parts = model.train().loss(changed, 0.5)
        torch.testing.assert_close(parts["total"], parts["kd"] + parts["repair"] + parts["head"])
        _, student = restored(model, changed["image"])
        with torch.no_grad():
            target = model.scale(model.teacher(clean))
        expected = 0.0
        for t, s in zip(target, student, strict=True):
            masked = F.adaptive_max_pool2d(batch["mask"], t.shape[2:])[:, 0] == 1
            distance = 1 - F.cosine_similarity(t.double(), s.double(), dim=1)
            expected += distance[masked].mean().item()
        assert parts["repair"].item() == pytest.approx(REPAIR * expected, rel=1e-4)
        parts["repair"].backward()
        assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
        assert all(p.grad is None for part in (model.teacher, model.head) for p in part.parameters())
        same = model.loss(changed | {"image": clean}, 0.5)  # real defects have no image without them
        assert same["repair"] == 0

    def test_the_second_teacher_learns_with_the_head_and_is_kept_on_normals(self, make_config, batch):
        """keep: the mean distance of its features from the frozen one's on normal positions."""
        settings = {"model__name": "remind", "model__width": 0.5, "model__bank_fraction": 0}
        settings["model__feature_gain"] = 0.2
        torch.manual_seed(0)
        plain = build_model(make_config(**settings), pretrained=False)
        config = make_config(loss__terms=["adapt"], optim__lr=5e-2, **settings)
        torch.manual_seed(0)
        model = build_model(config, pretrained=False)
        for each in (plain, model):
            each.fit_statistics([batch["image"]])
        before, parts = plain.eval().loss(batch, 0.5), model.eval().loss(batch, 0.5)
        assert parts["keep"].item() == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close((parts["kd"], parts["head"]), (before["kd"], before["head"]))
        found, expected = model.predict(batch["image"]), plain.predict(batch["image"])
        torch.testing.assert_close(found.anomaly_map, expected.anomaly_map)

        groups = model.parameter_groups(config.optim)
        assert [(g["name"], g["lr"]) for g in groups] == [("model", 5e-2), ("teacher", SECOND_RATE * 5e-2)]
        learning = [p for p in model.parameters() if p.requires_grad]
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in learning}
        optimizer, _ = make_optimizer(groups, config)
        model.train()
        statistics = {k: v.clone() for k, v in model.second.state_dict().items() if "running" in k}
        for _ in range(12):
            optimizer.zero_grad()
            model.loss(batch, 0.5)["total"].backward()
            optimizer.step()
        assert all(torch.equal(v, model.second.state_dict()[k]) for k, v in statistics.items())
        with torch.no_grad():
            frozen, second = (model.scale(net(batch["image"])) for net in (model.teacher, model.second))
        keep = shown = 0.0
        for f, s in zip(frozen, second, strict=True):
            masked = F.adaptive_max_pool2d(batch["mask"], f.shape[2:])[:, 0] == 1
            distance = 1 - F.cosine_similarity(f.double(), s.double(), dim=1)
            keep += distance[~masked].mean().item()
            shown += distance[masked].mean().item()
        clean = torch.where(batch["mask"] == 1, -batch["image"], batch["image"])
        parts, both = model.loss(batch, 0.5), model.loss(batch | {"clean": clean}, 0.5)
        assert parts["keep"].item() == pytest.approx(keep, rel=1e-4, abs=1e-6)
        assert parts["head"] < before["head"] and shown > 2 * keep > 0
        with torch.no_grad():  # the student restores the frozen teacher's features, of what was there
            student = model.restored([], batch["image"])[1]
            normal = [unmasked_positions(f.shape[2:], batch["mask"]) for f in frozen]
            there = model.scale(model.teacher(clean))
            kd = sum(hardest_distance(*x, 0.1) for x in zip(frozen, student, normal, strict=True))
            kept = zip(there, student, [~n for n in normal], strict=True)
            repair = REPAIR * sum(hardest_distance(*x, 1) for x in kept)
        torch.testing.assert_close((parts["kd"].detach(), both["repair"].detach()), (kd, repair))

        reached = {"kd": {"student", "bottleneck"}, "head": {"head", "second"}, "keep": {"second"}}
        for name, those in reached.items():
            model.zero_grad()
            model.loss(batch, 0.5)[name].backward()
            moved = [key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()]
            assert {key.split(".")[0] for key in moved} == those, name
        found, folded = model.eval().predict(batch["image"]), model.deploy().predict(batch["image"])
        torch.testing.assert_close(folded.score, found.score, rtol=1e-3, atol=1e-4)

    def test_prediction(self, model, batch):
        images = batch["image"]
        with torch.no_grad():
            for _ in range(3):
                restored(model.train(), images)  # batch norms that know these images
            found, alone = model.eval().predict(images), model.predict(images[2:3])
            folded = model.deploy().predict(images)
        assert found.anomaly_map.shape == (4, 64, 64) and found.score.shape == (4,)
        torch.testing.assert_close(found.score[2:3], alone.score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.anomaly_map, folded.anomaly_map, rtol=1e-3, atol=1e-4)

    def test_no_head_where_no_defect_is_shown(self, make_config, batch):
        settings = {"model__width": 0.5, "model__bank_fraction": 0, "data__synthetic": 0}
        model = build_model(make_config(model__name="remind", **settings))
        assert model.head is None and set(model.train().loss(batch, 0.5)) == {"kd", "total"}
        assert model.eval().predict(batch["image"]).score.shape == (4,)

    @torch.no_grad()
    def test_map_is_multiplied_by_the_probability(self, model, batch):
        model.eval().decision = Decision("max", 0, 0, 0.0, 0.0)
        found = model.predict(batch["image"])
        logits = model.head(*restored(model, batch["image"]))
        torch.nn.init.constant_(model.head.out.bias, -100)  # a head that knows nothing leaves a twentieth
        nothing = model.predict(batch["image"])
        probability = F.interpolate(logits, (64, 64), mode="bilinear")[:, 0].sigmoid()
        model.head = None
        plain = model.predict(batch["image"])
        torch.testing.assert_close(found.anomaly_map, plain.anomaly_map * (probability + 0.05))
        torch.testing.assert_close(nothing.anomaly_map, plain.anomaly_map / 20)
        torch.testing.assert_close(found.score, found.anomaly_map.amax(dim=(1, 2)))


class TestWithBank:
    @pytest.fixture
    def model(self, make_config, request):
        settings = {"model__name": "remind", "model__width": 0.5, "model__bank_fraction": 0.25}
        model = build_model(make_config(loss__terms=getattr(request, "param", []), **settings)).eval()
        if model.second is not None:
            with torch.no_grad():
                for weights in model.second.parameters():  # it has learnt
                    weights.mul_(1.1 + 0.1 * torch.rand_like(weights))
        return model

    @pytest.mark.parametrize("model", [[], ["adapt"]], indirect=True, ids=["one teacher", "adapt"])
    @torch.no_grad()
    def test_both_distances_over_their_units_times_the_head(self, model, batch):
        images = batch["image"]
        model.fit([images[:3], images[3:]], seed=0)
        kept = placed(patches_of(model.teacher(images)), model.place).flatten(0, 2)  # the frozen teacher's
        assert torch.cdist(model.bank, kept).amin(1).max() < 0.02
        model.train().fit_score([images[:1], images[1:]])
        assert model.training and model.eval().usual.shape == (2,)
        model.decision = Decision("max", 0, 0, 0.0, 0.0)

        def enlarged(maps):
            return F.interpolate(maps[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0]

        def distances(images):
            raw = model.teacher(images)
            teacher, student = model.restored(raw, images)
            own = sum(
                F.interpolate(distance_map(t, s)[:, None], (64, 64), mode="bilinear", align_corners=True)[
                    :, 0
                ]
                for t, s in zip(teacher, student, strict=True)
            )
            patches = placed(patches_of(raw), model.place)
            far = torch.cdist(patches.flatten(0, 2), model.bank).amin(1).view(patches.shape[:3])
            far = far / model.usual[1]
            assert (far > 1).any() and (far < 1).any()
            far = torch.where(
                far > 1, 3 * far - 2, far
            )  # what is farther than normals are counts three times
            head = (
                F.interpolate(model.head(teacher, student), (64, 64), mode="bilinear")[:, 0].sigmoid() + 0.05
            )
            return own, F.interpolate(far[:, None], (64, 64), mode="bilinear", align_corners=True)[:, 0], head

        own, far, head = distances(images + 0.5)
        expected = (own / model.usual[0] + far) * head
        torch.testing.assert_close(model.predict(images + 0.5).anomaly_map, expected, rtol=1e-4, atol=1e-5)
        # the unit of each distance is the mean of its largest hundredth on normals
        raw = model.teacher(images)
        teacher, student = model.restored(raw, images)
        maps = [distance_map(t, s)[:, None] for t, s in zip(teacher, student, strict=True)]
        size = maps[0].shape[2:]
        own = sum(F.interpolate(m, size, mode="bilinear", align_corners=True)[:, 0] for m in maps)
        patches = placed(patches_of(raw), model.place).flatten(0, 2)
        far = torch.cdist(patches, model.bank).amin(1).view(len(images), -1)
        expected = [
            np.mean(
                [np.sort(row)[-max(1, len(row) // 100) :].mean() for row in one.flatten(1).double().numpy()]
            )
            for one in (own, far)
        ]
        torch.testing.assert_close(model.usual.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_part_in_the_wrong_place_is_far(self, make_config, model):
        """Without its place a patch that is usual elsewhere has distance 0; a tile's place counts nothing."""
        image = torch.randn(1, 3, 64, 64)
        raw = model.teacher(image)
        model.fit([image], seed=0)
        patches = patches_of(raw)
        spread = patches.flatten(0, 2).double().var(dim=0).sum().sqrt()
        assert len(model.bank) == 16 and 0.7 < model.place / (6 * spread) < 1.4  # of a quarter of the patches
        model.bank = placed(patches, model.place).flatten(0, 2)
        moved = patches.roll((4, 4), dims=(1, 2))
        assert nearest(moved, patches.flatten(0, 2)).amax() < 0.02
        far = nearest(placed(moved, model.place), model.bank)
        assert far.amin() > 0.1 and far.amax() <= model.place * 0.5**0.5 + 0.02
        rows = placed(torch.zeros(1, 2, 4, 1), 8.0)[0, :, :, 1:]
        assert rows[:, 0].tolist() == [[2, 1], [6, 1]] and rows[0, :, 1].tolist() == [1, 3, 5, 7]
        cut = build_model(make_config(model__name="remind", model__bank_fraction=0.25, data__tile=64))
        cut.fit([image], seed=0)
        assert cut.place == 0 and (cut.bank[:, -2:] == 0).all()

    @torch.no_grad()
    def test_tiles_are_measured_as_they_are_scored(self, make_config):
        """The mean over an image's tiles, of which those of 64 pixels that cover 64 x 128 are three."""
        settings = {"model__name": "remind", "model__width": 0.5, "model__bank_fraction": 0.25}
        whole = build_model(make_config(**settings)).eval()
        cut = build_model(make_config(**settings, data__tile=64, data__image_size=(64, 128))).eval()
        image = torch.randn(1, 3, 64, 128)
        tiles = torch.cat([image[..., x : x + 64] for x in (0, 32, 64)])
        cut.fit([image], seed=0)
        whole.load_state_dict(cut.state_dict())
        cut.fit_score([image])
        whole.fit_score([tiles])
        torch.testing.assert_close(cut.usual, whole.usual, rtol=1e-4, atol=0)

    def test_candidates_are_bounded_and_equally_likely(self):
        """A part of what is drawn without a bound, whatever the batches; early and late images alike."""
        features = patches_of([torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)])
        levels = [features + i for i in range(40)]
        whole = sample_patches(levels, 0.5, seed=3)
        assert torch.equal(sample_patches(levels, 0.5, seed=3, most=len(whole)), whole)
        some = sample_patches(levels, 0.5, seed=3, most=200)
        batched = [torch.cat(levels[i : i + 5]) for i in range(0, 40, 5)]
        assert torch.equal(sample_patches(batched, 0.5, seed=3, most=200), some) and len(some) == 200
        places = (whole[:, None] == some).all(dim=2).nonzero()[:, 0]  # in the order of the images
        assert len(places) == 200 and torch.equal(places, places.sort().values)
        assert 60 < (places < len(whole) // 2).sum() < 140

    @torch.no_grad()
    def test_a_bank_of_one_patch_has_a_place(self, make_config):
        model = build_model(make_config(model__name="remind", model__bank_fraction=0.001))
        model.fit([torch.randn(1, 3, 64, 64)], seed=0)
        assert model.bank.shape[0] == 1 and model.place == 0 and model.bank.isfinite().all()

    @torch.no_grad()
    def test_equal_images_have_a_unit_above_rounding(self, make_config):
        """Their distances from the bank are what cdist rounds, in the forms of several libraries."""
        model = build_model(make_config(model__name="remind", model__bank_fraction=1)).eval()
        images = torch.randn(1, 3, 64, 64).repeat(4, 1, 1, 1)
        model.fit([images], seed=0)
        model.fit_score([images])
        length = model.bank.norm(dim=1).mean()
        assert model.usual[1] == pytest.approx(1e-3 * length.item(), rel=1e-4)

    @torch.no_grad()
    def test_the_sum_has_no_highest_value(self, make_config, model, batch, monkeypatch):
        """A student's distance is 2 at most; a bank's has no bound, so it cuts no share of the pixels."""
        asked, plain = [], model.decision
        model.decision = lambda *words, highest, **rest: asked.append(highest) or plain(*words, **rest)
        model.fit([batch["image"]], seed=0)
        model.predict(batch["image"])
        model.fits = 0
        model.predict(batch["image"])
        assert asked == [math.inf, 2]

    def test_wide_features_are_fewer(self, model, monkeypatch):
        """The candidates take 256 MiB at most, whatever the backbone."""
        asked = []
        monkeypatch.setattr(remind, "sample_patches", lambda *_, most, **__: asked.append(most) or 1 / 0)
        for width in (154, 256, 1538):
            model.bank = torch.zeros(0, width)
            with pytest.raises(ZeroDivisionError):
                model.fit([], seed=0)
        assert asked[:2] == [1 << 18, 1 << 18] and asked[2] * 1538 * 4 <= 1 << 28 < (asked[2] + 1) * 1538 * 4

    def test_without_one_a_state_has_no_more_than_before(self, make_config, model):
        settings = {"model__width": 0.5, "model__bank_fraction": 0}
        plain = build_model(make_config(model__name="remind", **settings))
        assert not plain.fits and model.fits == 512
        assert set(model.state_dict()) - set(plain.state_dict()) == {"bank", "place", "usual"}

    @torch.no_grad()
    def test_a_stored_bank_comes_back(self, make_config, model, batch):
        model.fit([batch["image"]], seed=0)
        again = build_model(
            make_config(model__name="remind", model__width=0.5, model__bank_fraction=0.25)
        ).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.predict(batch["image"]).score, model.predict(batch["image"]).score)

    @pytest.mark.slow
    def test_training_with_it(self, mvtec_like, tmp_path, monkeypatch):
        """A resumed run has the bits of one that was not stopped; the best state has its bank, too."""
        flags = [
            "--config", "configs/folder.yaml", "--data-root", str(mvtec_like), "--category", "part",
            "--quiet", "--model", "remind", "--backbone", TINY, "--weights", "random", "--precision", "fp32",
            "--device", "cpu", "--set", "data.image_size=64", "--set", "model.width=0.25",
            "--set", "loss.terms=[repair]", "--set", "data.synthetic_kinds=[texture,moved]",
            "--set", "model.bank_fraction=0.5", "--set", "eval.every=2", "--select", "best",
            "--iterations", "4", "--save-every", "1", "--output", str(tmp_path),
        ]  # fmt: skip
        plain, calls = TrainingStep.__call__, []

        def stopped(step, batch):
            calls.append(step)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return plain(step, batch)

        assert run_command(train_command.main, [*flags, "--name", "whole"]) == 0
        monkeypatch.setattr(TrainingStep, "__call__", stopped)
        assert run_command(train_command.main, [*flags, "--name", "stopped"]) != 0
        monkeypatch.setattr(TrainingStep, "__call__", plain)
        folder = tmp_path / "folder/one-class/part"
        state = load_checkpoint(folder / "stopped/last.pt")  # predict.py takes it, too
        assert state.iteration == 2 and (state.model["usual"] != 1).all()
        assert run_command(train_command.main, [*flags, "--name", "stopped", "--resume"]) == 0
        whole, resumed = (load_checkpoint(folder / name / "last.pt").model for name in ("whole", "stopped"))
        assert len(whole["bank"]) > 9 and (whole["usual"] != 1).all()
        assert all(torch.equal(values, resumed[name]) for name, values in whole.items())
        assert (load_checkpoint(folder / "whole/best.pt").model["usual"] != 1).all()


class TestSyntheticTraining:
    @pytest.fixture
    def data(self, mvtec_like):
        train = [s for s in collect(MVTEC, mvtec_like, "part") if s.split == "train"]
        options = {"share": 0.5, "kinds": ("scratch", "stain"), "seed": 4}
        return SyntheticTraining(ImageSet(train, Decode((64, 64)), NORMALISE), **options)

    def test_masks_are_exact_and_half_the_draws_defective(self, data):
        n = len(data)
        batch = data.__getitems__(list(range(40 * n)))
        clean = NORMALISE(np.stack([data.pixels(i) for i in range(n)])).repeat(40, 1, 1, 1)
        changed = (batch["image"] != clean).any(dim=1, keepdim=True)
        assert torch.equal(changed, batch["mask"] == 1)
        assert torch.equal(batch["label"] == 1, changed.flatten(1).any(dim=1))
        assert abs(batch["label"].float().mean().item() - 0.5) < 3 * 0.5 / math.sqrt(40 * n)
        assert batch["index"].tolist() == list(range(n)) * 40

    @pytest.mark.parametrize("augment", ["none", "flip", "flip-rotate", "by-category", "tile", "scale"])
    def test_the_image_without_the_defect_goes_along(self, data, make_config, augment):
        draws = list(range(24))
        assert "clean" not in data.__getitems__(draws)
        data.with_clean = True
        batch = data.__getitems__(draws)
        expected = NORMALISE(np.stack([data.pixels(i % len(data)) for i in draws]))
        assert torch.equal(batch["clean"], expected)
        settings = {"data__augment": augment} if augment in ("flip", "flip-rotate", "by-category") else {}
        settings |= {"data__augment_by_category": {"part": ["hflip", "rot90"]}}
        settings |= {"data__image_size": 64, "data__tile": 32 if augment == "tile" else None}
        settings |= {"train__scales": [1.0, 0.5]} if augment == "scale" else {}
        after = augment_batch(batch, make_config(model__name="remind", **settings), 1, ["part"] * 24)
        differs = (after["image"] != after["clean"]).any(dim=1, keepdim=True)
        assert after["clean"].shape == after["image"].shape and differs.any()
        wide = F.max_pool2d(after["mask"].float(), 5, stride=1, padding=2) == 1  # interpolation blurs
        assert not (differs & ~wide).any()
        assert augment == "none" or not torch.equal(after["clean"], expected)

    def test_worse_cameras(self, data):
        """Normal draws vary, too; a draw is the same again; with and without a defect differ there alone."""
        draws = list(range(10 * len(data)))
        plain = data.__getitems__(draws)
        data.degrades = data.with_clean = True
        batch, again = data.__getitems__(draws), data.__getitems__(draws)
        assert torch.equal(batch["image"], again["image"]) and torch.equal(batch["mask"], plain["mask"])
        same = (batch["image"] == plain["image"]).flatten(1).all(dim=1).float()
        assert abs(same.mean().item() - 0.5 * 0.65) < 3 * 0.47 / len(draws) ** 0.5
        differs = (batch["image"] != batch["clean"]).any(dim=1, keepdim=True)
        normal = batch["label"] == 0
        assert normal.any() and not differs[normal].any() and differs[~normal].flatten(1).any(dim=1).all()
        near = F.max_pool2d(batch["mask"].float(), 33, stride=1, padding=16) == 1  # JPEG spreads over blocks
        assert not (differs & ~near).any()

    def test_worse_cameras_of_frames(self, data):
        """Each grey frame is compressed by itself: what one shows leaves no trace in the others."""
        image = np.full((64, 64, 3), 128, np.uint8)
        image[..., 0] = np.random.default_rng(0).integers(0, 256, (64, 64))
        for seed in range(20):  # the other frames are even, so blurring and compressing keep them
            assert (degraded(image, np.random.default_rng(seed), frames=True)[..., 1:] == 128).all()
        assert any((degraded(image, np.random.default_rng(seed))[..., 1:] != 128).any() for seed in range(20))
        image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        seen = 0
        for seed in range(40):  # the colours are those of a JPEG, of which blue is the least exact
            rng = np.random.default_rng(seed)
            if rng.random() >= 0.5 and rng.random() < 0.35:
                found = degraded(image, np.random.default_rng(seed))
                Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=int(rng.integers(40, 96)))
                assert np.abs(found.astype(int) - np.asarray(Image.open(file))).mean() < 2
                seen += 1
        assert seen > 3
        data.samples = [replace(s, earlier=(s.path, s.path)) for s in data.samples]
        data.degrades, draws = True, list(range(5 * len(data)))
        grey = np.repeat(image[None, ..., :1], len(draws), axis=0).repeat(3, axis=3)
        assert not any(np.ptp(data._taken(draw, picture), axis=2).any() for draw, picture in enumerate(grey))

    @pytest.mark.parametrize("terms", [[], ["adapt"]])
    def test_a_teacher_that_learns_is_shown_worse_cameras(self, make_config, mvtec_like, terms):
        settings = {"run__data_root": str(mvtec_like), "data__category": "part", "loss__terms": terms}
        data = build_data(make_config(model__name="remind", **settings), NORMALISE)
        assert data.train.degrades == bool(terms)

    def test_a_draw_is_always_the_same_and_epochs_differ(self, data):
        n = len(data)
        once, again = data.__getitems__([3, n + 3, 5]), data.__getitems__([5, n + 3, 3])
        assert torch.equal(once["image"], again["image"].flip(0))
        epochs = data.__getitems__([3 + n * epoch for epoch in range(12)])
        shown = epochs["image"][epochs["label"] == 1]
        assert len(shown) > 2 and len({x.numpy().tobytes() for x in shown}) == len(shown)

    def test_goes_on_anywhere(self, data):
        def seen(start, workers=0):
            order = TrainingOrder(len(data), 3, seed=0, start=start, stop=12)
            return [
                b["image"] for b in training_batches(data, order, workers=workers, device=torch.device("cpu"))
            ]

        assert all(torch.equal(a, b) for a, b in zip(seen(0)[7:], seen(7), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(seen(7), seen(7, workers=2), strict=True))

    def test_real_anomalies_are_kept(self, mvtec_like):
        samples = [s for s in collect(MVTEC, mvtec_like, "part") if s.label == 1 and s.mask_path]
        options = {"share": 1.0, "kinds": ("scratch",), "seed": 4}
        data = SyntheticTraining(ImageSet(samples, Decode((64, 64)), NORMALISE), **options)
        batch = data.__getitems__(list(range(len(data))))
        plain = super(SyntheticTraining, data).__getitems__(list(range(len(data))))
        assert all(torch.equal(batch[key], plain[key]) for key in plain)

    def test_validation_has_other_kinds(self, make_config, mvtec_like):
        settings = {"run__data_root": str(mvtec_like), "data__category": "part", "eval__split": "validation"}
        kinds = {"data__synthetic_kinds": ["stain", "cut"]}
        config = make_config(model__name="remind", **kinds, **settings)
        assert validation_kinds(config.data) == ("texture", "scratch")
        data = build_data(config, NORMALISE)
        assert isinstance(data.train, SyntheticTraining) and data.validation.samples[-1].label == 1
        assert not isinstance(data.test, SyntheticTraining)
        remind = make_config(model__name="remind")
        assert validation_kinds(remind.data) == validation_kinds(make_config().data)
        video = make_config("configs/ped2.yaml", model__name="remind").data  # trained on all but this one
        assert validation_kinds(video) == ("zoom",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__flavor": "tuned"}, "--model remind in place of --flavor tuned"),
        ({"data__synthetic": 0.5, "data__synthetic_kinds": []}, "kinds to draw from"),
        ({"loss__terms": ["repair"]}, "loss.terms repair is for remind with defects"),
        (
            {"loss__terms": ["adapt"], "model__name": "remind", "data__synthetic": 0},
            "terms adapt is for remind with",
        ),
        ({"data__synthetic": 0.5, "data__synthetic_kinds": ["dent"]}, "choose one of texture"),
        ({"data__synthetic": 0.5, "path": "configs/ped2.yaml"}, "single images"),
    ],
)
def test_settings_that_do_not_go_together(make_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**settings)


@pytest.mark.parametrize(
    "path", sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if p.stem != "base")
)
@pytest.mark.parametrize("setting", ["one-class", "multi-class", "supervised"])
def test_every_dataset_has_it(make_config, path, setting):
    config = make_config(f"configs/{path}", model__name="remind", model__setting=setting)
    assert config.model.head == ("speed" if path == "ped2.yaml" else "none")
    assert config.model.name == "remind" and config.loss.hard_ratio == 0.1
    assert config.data.synthetic == (0 if (path, setting) == ("kolektor.yaml", "supervised") else 0.5)


def test_real_masks_replace_synthetic_defects(make_config):
    """KolektorSDD, supervised: ReMIND keeps its own head, UniNet has the setting's."""
    remind = make_config("configs/kolektor.yaml", model__name="remind", model__setting="supervised")
    assert (remind.data.synthetic, remind.data.augment, remind.data.num_train_anomalies) == (0, "flip", 20)
    assert build_model(remind).head is not None
    released = make_config("configs/kolektor.yaml", model__flavor="released", model__setting="supervised")
    assert (released.model.head, released.loss.supervised) == ("mask", "structure")
    one_class = make_config("configs/kolektor.yaml", model__name="remind", model__setting="one-class")
    assert one_class.data.synthetic > 0 and one_class.data.synthetic_kinds == ("scratch",)
    assert one_class.data.augment == "none"


@pytest.mark.slow
def test_train_kill_resume(mvtec_like, tmp_path, monkeypatch):
    """A run that stops and goes on ends with the weights of one that does not."""
    common = [
        "--data-root", str(mvtec_like), "--category", "part", "--model", "remind", "--device", "cpu",
        "--quiet", "--backbone", TINY, "--precision", "fp32", "--iterations", "6",
        "--set", "data.image_size=64", "--weights", "random",
        "--set", "model.width=0.5", "--set", "train.batch_size=4", "--save-every", "2",
    ]  # fmt: skip
    assert run_command(train_command.main, [*common, "--output", str(tmp_path / "whole")]) == 0
    augment_batch, calls = train_command.augment_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return augment_batch(*args)

    monkeypatch.setattr(train_command, "augment_batch", interrupted)
    run_command(train_command.main, [*common, "--output", str(tmp_path / "killed")])
    assert run_command(train_command.main, [*common, "--output", str(tmp_path / "killed"), "--resume"]) == 0
    whole, killed = (
        torch.load(next((tmp_path / name).rglob("last.pt")), weights_only=True)["model"]
        for name in ("whole", "killed")
    )
    assert len(calls) == 4 + 4 and all(torch.equal(value, killed[key]) for key, value in whole.items())
