"""ReContrast: hard mining, two heads, its place beside UniNet."""

import pytest
import torch
import torch.nn.functional as F

from losses.kd import cosine_distance
from losses.mining import easy_positions, mined_distance, mining_alpha
from model import build_model
from model.recontrast import ReContrast
from model.student import Student


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


class TestModel:
    def test_two_heads_serve_their_halves(self):
        student = Student((8, 16, 32), 64, outputs=2).eval()
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

    def test_settings(self, make_config):
        config = make_config(model__name="recontrast", category="screw")
        assert (config.model.flavor, config.model.mem, config.model.dfs) == ("default", False, "none")
        assert (config.optim.lr, config.optim.lr_teacher, config.train.batch_size) == (2e-3, 1e-5, 16)
        assert (config.score.decision, config.score.map_sigma) == ("max", 4)
        assert make_config("configs/isic2018.yaml", model__name="recontrast").score.decision == "mean"
        assert make_config(model__setting="multi-class", model__name="recontrast").train.iterations == 5000
