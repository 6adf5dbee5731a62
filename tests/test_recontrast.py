"""ReContrast: hard mining, two heads, its place beside UniNet."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import levels

from losses.kd import cosine_distance
from model import build_model
from model.decision import Decision, gaussian_blur
from model.peers.recontrast import ReContrast, easy_positions, mined_distance, mining_alpha
from model.student import Student
from utils.errors import ConfigError


class TestMining:
    def test_alpha(self):
        assert [mining_alpha(p) for p in (0, 0.05, 0.1, 0.5)] == pytest.approx([-3, -1, 1, 1])

    def test_threshold_by_hand(self):
        teacher, student = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(2))
        d = torch.empty(3, 1, 5, 6, dtype=torch.float64)
        for b in range(3):
            for y in range(5):
                for x in range(6):
                    t, s = teacher[b, :, y, x], student[b, :, y, x]
                    d[b, 0, y, x] = 1 - (t @ s) / (t.norm() * s.norm())
        for alpha in (-3.0, 0.0, 1.0):
            assert torch.equal(easy_positions(teacher, student, alpha), d < d.mean() + alpha * d.std())

    def test_gradient_is_exactly_zero_where_easy(self):
        teacher, student = (torch.randn(2, 4, 6, 6, dtype=torch.float64) for _ in range(2))
        teacher.requires_grad_()
        student.requires_grad_()
        easy = easy_positions(teacher, student, 0.5).expand_as(student)
        value = mined_distance(teacher, student, 0.5)
        value.backward()
        assert value.item() == cosine_distance(teacher, student, reading="global").item()
        assert easy.any() and not easy.all() and teacher.grad is None
        assert (student.grad[easy] == 0).all() and (student.grad[~easy] != 0).any()
        plain = student.detach().requires_grad_()
        cosine_distance(teacher.detach(), plain, reading="global").backward()
        torch.testing.assert_close(student.grad[~easy], plain.grad[~easy])

    def test_at_the_start_nearly_all_count(self):
        teacher, student = (torch.randn(2, 8, 16, 16) for _ in range(2))
        assert easy_positions(teacher, student, -3).float().mean() < 0.02


class TestMultiClass:
    @torch.no_grad()
    def test_decoder_with_gelu(self):
        student = Student(levels(8, 16, 32), 64, outputs=2, activation="gelu").eval()
        assert not any(isinstance(m, torch.nn.ReLU) for m in student.modules())
        block = student.stages[0][1]
        x = torch.randn(2, 32, 4, 4)
        first, _, second, _, third = block.body

        def gelu(t):
            return t * (1 + torch.erf(t / 2**0.5)) / 2

        expected = gelu(third(gelu(second(gelu(first(x))))) + x)
        torch.testing.assert_close(block(x), expected)
        assert expected.min() < 0

    def test_blur_has_a_small_kernel_and_zeros_beyond_the_border(self):
        kernel = torch.tensor([[math.exp(-(y * y + x * x) / 32) for x in range(-2, 3)] for y in range(-2, 3)])
        maps = torch.rand(2, 9, 7)
        expected = F.conv2d(maps[:, None], (kernel / kernel.sum())[None, None], padding=2)[:, 0]
        torch.testing.assert_close(gaussian_blur(maps, 4.0, 5), expected)
        constant = gaussian_blur(torch.ones(1, 9, 9), 4.0, 5)[0]
        assert constant[4, 4].item() == pytest.approx(1) and constant[0, 0] < 0.5
        assert torch.equal(gaussian_blur(maps, 0.0, 5), maps)

    def test_map_and_score(self, make_config):
        """Sum of the maps, blurred; score: mean of the top 1 % of that."""
        config = make_config(model__name="recontrast", model__setting="multi-class", data__image_size=32)
        decision = Decision(**asdict(config.score))
        maps = [torch.rand(2, 4, 4), torch.rand(2, 8, 8)]
        found = decision(maps, (32, 32))
        total = sum(F.interpolate(m[:, None], 32, mode="bilinear", align_corners=True)[:, 0] for m in maps)
        torch.testing.assert_close(found.anomaly_map, gaussian_blur(total, 4.0, 5))
        top = gaussian_blur(total, 4.0, 5).flatten(1).sort(dim=1, descending=True).values[:, :10]
        torch.testing.assert_close(found.score, top.mean(dim=1))


class TestModel:
    def test_two_heads_serve_their_halves(self):
        student = Student(levels(8, 16, 32), 64, outputs=2).eval()
        embedding = torch.randn(4, 64, 2, 2)
        before = student(embedding, [])
        with torch.no_grad():
            for head in student.second_heads:
                head.bias += 1
        for a, b in zip(before, student(embedding, [])):
            assert torch.equal(a[:2], b[:2])
            torch.testing.assert_close(a[2:] + 1, b[2:])

    def test_loss_is_half_the_sum_of_each_side(self, make_config):
        model = build_model(make_config(model__name="recontrast")).train()
        assert isinstance(model, ReContrast) and len(model.student.second_heads) == 3
        batch = {"image": torch.randn(2, 3, 64, 64)}
        with torch.no_grad():
            parts = model.loss(batch, 1.0)
            pairs = model.features(batch["image"])
            expected = [(1 - F.cosine_similarity(t.flatten(1), s.flatten(1))).mean() for _, t, s in pairs]
        torch.testing.assert_close(parts["source"], sum(expected[:3]) / 2, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts["total"], sum(expected) / 2, rtol=1e-4, atol=1e-5)

    def test_the_encoder_learns_through_the_decoder_only(self, make_config):
        model = build_model(make_config(model__name="recontrast")).train()
        model.loss({"image": torch.randn(2, 3, 64, 64)}, 0.0)["total"].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.teachers.target.parameters())
        assert all(p.grad is None for p in model.teachers.source.parameters())

    @pytest.mark.parametrize(("category", "mode"), [("screw", False), ("bottle", True)])
    def test_batch_norm_of_the_encoder_by_category(self, make_config, category, mode):
        model = build_model(make_config(category=category, model__name="recontrast")).train()
        assert model.teachers.target.training == mode and model.student.training
        assert not model.teachers.source.training

    def test_multi_class_settings(self, make_config):
        """The model's own block for a setting; the other setting has nothing of it."""
        for path in ("configs/mvtec.yaml", "configs/visa.yaml"):
            one = make_config(path, model__name="recontrast")
            many = make_config(path, model__name="recontrast", model__setting="multi-class")
            assert (one.model.student_activation, many.model.student_activation) == ("relu", "gelu")
            assert (one.score.blur_size, many.score.blur_size) == (None, 5)
            assert (one.score.decision, many.score.decision) == ("max", "top1")
            assert (one.model.teacher_bn, many.model.teacher_bn) == ("train", "eval")
            assert (one.train.last_batch, many.train.last_batch) == ("carry", "drop")
            assert many.score.map_sigma == many.score.score_sigma == 4
        assert make_config(model__setting="multi-class").model.student_activation == "relu"
        with pytest.raises(ConfigError, match=r"blur_size 4 must be odd"):
            make_config(score__blur_size=4)

    def test_settings(self, make_config):
        config = make_config(model__name="recontrast", category="screw")
        assert (config.model.flavor, config.model.mem_kernels, config.model.dfs) == ("default", None, "none")
        assert (config.optim.lr, config.optim.lr_teacher, config.train.batch_size) == (2e-3, 1e-5, 16)
        assert (config.score.decision, config.score.map_sigma) == ("max", 4)
        assert make_config("configs/isic2018.yaml", model__name="recontrast").score.decision == "mean"
        assert make_config(model__setting="multi-class", model__name="recontrast").train.iterations == 5000
