"""Eq. 13 and what belongs to it: supervised losses, heads, skips, augmentation, several sizes."""

import math

import numpy as np
import pytest
import torch
from conftest import levels
from torch import nn

from datasets.transforms import flip, flip_rotate, rescale
from losses.supervised import (
    _upsample_by_products,
    bce_loss,
    dice_loss,
    structure_loss,
    supervised_loss,
    upsample,
)
from model import build_model
from model.heads import FrameHead, LabelHead, MaskHead
from model.student import Student
from utils.errors import ConfigError


def logits_and_mask(seed=0, size=(40, 37)):
    rng = np.random.default_rng(seed)
    mask = np.zeros((2, 1, *size))
    mask[0, 0, 5:20, 8:30] = 1
    mask[1, 0, 30:, :6] = 1  # at the border
    return torch.tensor(rng.normal(size=(2, 1, *size))), torch.tensor(mask)


class TestLosses:
    def test_bce_leaves_unknown_labels_out(self):
        logits, target = torch.tensor([0.3, -2.0, 5.0], dtype=torch.float64), torch.tensor([1, 0, -1])
        p = logits.sigmoid()
        expected = -(p[0].log() + (1 - p[1]).log()) / 2
        assert bce_loss(logits, target).item() == pytest.approx(expected.item(), abs=1e-12)
        assert bce_loss(logits, torch.full((3,), -1)).item() == 0

    def test_dice(self):
        logits, mask = logits_and_mask()
        p = 1 / (1 + (-logits).exp())
        expected = [1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, mask)]
        assert dice_loss(logits, mask).item() == pytest.approx(sum(expected).item() / 2, abs=1e-12)
        assert dice_loss(100 * (2 * mask - 1), mask).item() == pytest.approx(0, abs=1e-12)

    def test_structure_against_loops(self):
        logits, mask = logits_and_mask()
        weight = torch.ones_like(mask)
        for b in range(2):
            for y in range(40):
                for x in range(37):
                    # the released window divides by 31 x 31 at the border, too: outside counts as background
                    window = mask[b, 0, max(0, y - 15) : y + 16, max(0, x - 15) : x + 16]
                    weight[b, 0, y, x] += 5 * abs(window.sum() / 31**2 - mask[b, 0, y, x])
        p = logits.sigmoid()
        entropy = -(mask * p.log() + (1 - mask) * (1 - p).log())
        total = 0
        for b in range(2):
            both = (weight[b] * p[b] * mask[b]).sum()
            either = (weight[b] * (p[b] + mask[b])).sum()
            total += entropy.mean() + 1 - (both + 1) / (either - both + 1)
        assert structure_loss(logits, mask).item() == pytest.approx(total.item() / 2, abs=1e-10)

    @pytest.mark.parametrize("loss", [dice_loss, structure_loss])
    def test_gradients(self, loss):
        logits, mask = logits_and_mask(size=(6, 5))
        torch.autograd.gradcheck(lambda x: loss(x, mask), logits.requires_grad_())

    def test_sum_over_outputs_which_are_upsampled(self):
        mask = torch.zeros(1, 1, 8, 8)
        outputs = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)]
        assert supervised_loss(outputs, mask, "bce").item() == pytest.approx(3 * math.log(2), abs=1e-6)


class TestUpsampling:
    @pytest.mark.parametrize("align_corners", [False, True])
    @pytest.mark.parametrize("size", [(16, 12), (9, 31), (5, 4)])
    def test_by_products_is_that_of_torch(self, size, align_corners):
        """Values and gradients; a GPU takes it where features learn."""
        found = []
        for function in (upsample, _upsample_by_products):
            x = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            x.requires_grad_()
            y = function(x, size, align_corners=align_corners)
            y.square().sum().backward()
            found.append((y.detach(), x.grad))
        assert found[0][0].shape == (2, 3, *size)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_the_same_size_is_left_as_it_is(self):
        x = torch.randn(1, 2, 4, 5)
        assert upsample(x, (4, 5)) is x
        torch.testing.assert_close(_upsample_by_products(x, (4, 5), align_corners=False), x)


class TestHeads:
    def test_shapes(self):
        feature = torch.randn(2, 12, 16, 8)
        assert LabelHead(12)(feature).shape == (2,)
        assert MaskHead(12)(feature).shape == (2, 1, 16, 8)
        assert FrameHead(12, 4).eval()(feature).shape == (2, 3, 64, 32)

    def test_label_head_is_a_linear_layer_on_the_mean(self):
        head, feature = LabelHead(3), torch.randn(2, 3, 4, 5)
        expected = feature.mean((2, 3)) @ head.linear.weight[0] + head.linear.bias
        torch.testing.assert_close(head(feature), expected)

    @pytest.mark.parametrize("width", [1.0, 2.0])
    def test_skips_reach_the_finer_levels_only(self, width):
        torch.manual_seed(0)
        student = Student(levels(8, 16, 32), 64, width=width, skips=True).eval()
        embedding = torch.randn(2, 64, 2, 2)
        teacher = [torch.randn(2, c, s, s) for c, s in ((8, 16), (16, 8), (32, 4))]
        before = student(embedding, teacher)
        changed = [student(embedding, [*teacher[:i], teacher[i] + 1, *teacher[i + 1 :]]) for i in range(3)]
        same = [[torch.equal(a, b) for a, b in zip(before, after)] for after in changed]
        assert same == [[True, True, True], [False, True, True], [False, False, True]]

    def test_no_skips_by_default(self):
        assert len(Student(levels(8, 16, 32), 64).skips) == 0


def batch_of(kind):
    image = torch.randn(4, 3, 64, 64)
    mask = torch.zeros(4, 1, 64, 64)
    mask[2:, :, 10:30, 20:40] = 1
    batch = {"image": image, "label": torch.tensor([0, 0, 1, 1]), "mask": mask, "index": torch.arange(4)}
    if kind == "frame":
        batch["frames"] = torch.stack([batch.pop("image"), torch.randn(4, 3, 64, 64)], dim=1)
    return batch


HEADS = [("label", "bce"), ("mask", "bce"), ("mask", "dice"), ("mask", "structure"), ("frame", "mse")]


class TestModel:
    @pytest.fixture
    def build(self, make_config):
        def call(head, loss, **settings):
            torch.manual_seed(0)
            return build_model(make_config(model__head=head, loss__supervised=loss, **settings))

        return call

    @pytest.mark.parametrize(("head", "loss"), HEADS)
    @pytest.mark.parametrize("levels", ["n-1", "finest"])
    def test_loss_and_prediction(self, build, head, loss, levels):
        model = build(head, loss, model__head_levels=levels, model__skip_connections=head == "mask").train()
        batch = batch_of(head)
        parts = model.loss(batch, 0.0)
        weights = model.loss_config
        rest = weights.kd_weight * parts["kd"] + (1 - weights.kd_weight) * parts["sc"] + parts["m"]
        torch.testing.assert_close(parts["total"], rest + parts["head"])
        parts["total"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.heads.parameters())
        assert len(model.heads) == (2 if levels == "n-1" and head != "frame" else 1)
        groups = model.parameter_groups(_Optim())
        assert {id(p) for p in model.heads.parameters()} <= {id(p) for p in groups[0]["params"]}
        images = batch["frames"] if head == "frame" else batch["image"]
        with torch.no_grad():
            found = model.eval().predict(images)
            alone = model.predict(images[2:3])
            folded = model.deploy().predict(images)
        assert found.anomaly_map.shape == (4, 64, 64) and found.score.shape == (4,)
        torch.testing.assert_close(found.score[2:3], alone.score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.score, folded.score, rtol=1e-3, atol=1e-4)
        if head == "mask":
            assert found.anomaly_map.min() >= 0 and found.anomaly_map.max() <= 1

    def test_a_label_head_joins_the_score_by_its_weight(self, build):
        images, scores = torch.randn(2, 3, 64, 64), []
        for weight in (0.0, 1.0, 3.0):
            model = build("label", "bce", score__head_weight=weight).eval()
            with torch.no_grad():
                scores.append(model.predict(images).score)
        probability = scores[1] - scores[0]
        assert ((probability > 0) & (probability < 1)).all()
        torch.testing.assert_close(scores[2] - scores[0], 3 * probability, rtol=1e-4, atol=1e-5)

    def test_frame_error_is_of_the_last_frame_and_maps_of_the_first(self, build):
        model = build("frame", "mse", score__head_weight=1.0).eval()
        frames = torch.randn(1, 2, 3, 64, 64)
        other = frames.clone()
        other[:, 1] += 1
        with torch.no_grad():
            a, b = model.predict(frames), model.predict(other)
            pairs = model.features(frames[:, 0])
            predicted = model.head_outputs(pairs)
        torch.testing.assert_close(a.anomaly_map, b.anomaly_map)
        gain = sum((p - other[:, 1]).square().mean() - (p - frames[:, 1]).square().mean() for p in predicted)
        torch.testing.assert_close((b.score - a.score)[0], gain, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("told", "differs"), [("label", True), ("mask", True), ("none", False)])
    def test_who_tells_the_similarity_losses_what_is_anomalous(self, build, told, differs):
        settings = {"loss__anomaly_source": told, "loss__temperature": 0.1, "model__dfs": "none"}
        model = build("label", "bce", **settings).train()
        batch = batch_of("label")
        with_anomalies = model.loss(batch, 0.0)["m"]
        normal = {"label": torch.zeros(4, dtype=torch.long), "mask": torch.zeros(4, 1, 64, 64)}
        without = model.loss(batch | normal, 0.0)["m"]
        assert (abs((with_anomalies - without).item()) > 1e-6) == differs

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model__head": "label"}, "model.head label and loss.supervised none do not go together"),
            ({"model__head": "label", "loss__supervised": "dice"}, "loss.supervised is one of bce"),
            ({"loss__supervised": "bce"}, "model.head none"),
            ({"data__frame_offset": 1}, "needs a model that looks at frames"),
            ({"data__center_crop": 1.5}, r"data.center_crop is 1.5; above 1 it is a side in whole pixels"),
            ({"data__center_crop": 5}, "data.center_crop is 5; .* at least 8"),
            ({"data__center_crop": 400.5}, "data.center_crop is 400.5"),
        ],
    )
    def test_settings_that_do_not_go_together(self, make_config, settings, message):
        with pytest.raises(ConfigError, match=message):
            make_config(**settings)

    def test_the_memory_bank_has_no_head(self, make_config):
        config = make_config("configs/ped2.yaml", model__name="memory-bank", data__frame_offset=0)
        assert config.model.head == config.loss.supervised == "none"


class _Optim:
    lr, lr_teacher = 5e-3, 1e-6


class TestAugmentation:
    def batch(self, count=64, size=(24, 40)):
        rng = np.random.default_rng(0)
        mask = torch.zeros(count, 1, *size)
        for i in range(count):
            y, x = rng.integers(4, size[0] - 10), rng.integers(4, size[1] - 10)
            mask[i, 0, y : y + 6, x : x + 5] = 1
        return {"image": mask.expand(-1, 3, -1, -1) * 2 - 1, "mask": mask.to(torch.uint8)}

    def test_mask_moves_with_the_image(self):
        batch = flip_rotate(self.batch(), np.random.default_rng(1))
        assert batch["mask"].dtype == torch.uint8 and set(batch["mask"].unique().tolist()) == {0, 1}
        differ = ((batch["image"][:, :1] > 0) != (batch["mask"] > 0)).float().mean()
        assert differ < 0.01  # only the rounding at borders

    def test_it_turns_and_keeps_areas(self):
        before = self.batch(size=(48, 48))
        after = flip_rotate(before, np.random.default_rng(1))
        assert not torch.equal(before["mask"], after["mask"])
        inner = slice(12, 36)
        areas = [b["mask"][:, :, inner, inner].float().sum() for b in (before, after)]
        assert 0.7 < areas[1] / areas[0] < 1.4

    def test_a_quarter_turn_is_exact(self):
        class Quarter:
            def uniform(self, low, high, count):
                assert (low, high) == (-math.pi / 2, math.pi / 2)
                return np.full(count, math.pi / 2)

            def choice(self, values, count):
                return np.ones(count)

        image = torch.randn(1, 3, 16, 16)
        turned = flip_rotate({"image": image}, Quarter())["image"]
        candidates = [torch.rot90(image, k, (2, 3)) for k in (1, 3)]
        assert min((turned - c).abs().max() for c in candidates) < 1e-4

    def test_flips(self):
        """Every image becomes one of its four mirror images and its mask the same one; all four occur."""
        before = {"image": torch.randn(64, 3, 6, 10), "mask": torch.randint(0, 2, (64, 1, 6, 10))}
        original = before["image"].clone()
        after = flip(before, np.random.default_rng(1))
        assert torch.equal(before["image"], original)
        seen = set()
        for i, image in enumerate(after["image"]):
            ways = [d for d in ((), (2,), (1,), (1, 2)) if torch.equal(image, original[i].flip(d))]
            assert len(ways) == 1 and torch.equal(after["mask"][i], before["mask"][i].flip(ways[0]))
            seen.update(ways)
        assert len(seen) == 4

    def test_flips_keep_the_memory_format_and_the_rest(self):
        images = torch.randn(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        batch = {"image": images, "label": torch.tensor([0, 1, 0])}
        flipped = flip(batch, np.random.default_rng(0))
        assert flipped["image"].is_contiguous(memory_format=torch.channels_last)
        assert flipped["label"] is batch["label"] and "mask" not in flipped

    def test_same_generator_same_batch(self):
        one, two = (flip_rotate(self.batch(4), np.random.default_rng([3, 5])) for _ in range(2))
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["mask"], two["mask"])

    def test_sizes(self):
        batch = {"image": torch.randn(2, 3, 256, 256), "mask": torch.ones(2, 1, 256, 256)}
        sizes = [tuple(rescale(batch, s)["image"].shape[2:]) for s in (0.75, 1.0, 1.25)]
        assert sizes == [(192, 192), (256, 256), (320, 320)]
        small = rescale(batch, 0.75)
        assert small["mask"].shape[2:] == (192, 192) and small["mask"].min() == 1
        assert rescale(batch, 1.0) is batch

    def test_no_mask_is_fine(self):
        assert "mask" not in flip_rotate({"image": torch.randn(2, 3, 8, 8)}, np.random.default_rng(0))


def test_heads_are_modules_of_the_state(make_config):
    model = build_model(make_config(model__head="mask", loss__supervised="dice"))
    assert isinstance(model.heads, nn.ModuleList) and "heads.0.conv.weight" in model.state_dict()
