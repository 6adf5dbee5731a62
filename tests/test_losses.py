"""Each loss against a dense float64 version of its equation, gradients included."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import similarity
from losses.kd import cosine_distance
from losses.similarity import (
    contrastive_loss,
    diagonal_and_logsumexp,
    diagonal_statistics,
    margin_loss,
    normal_positions,
    softmax_diagonal,
)
from losses.uninet import Pair, uninet_loss

BOTH = ("contrastive", "margin")


def dense_similarity(student, teacher, temperature):
    """Eqs. 8 and 9 as written: (B, C, H, W) twice to the diagonal of the normalised matrix, (B, N)."""
    s = student.flatten(2).transpose(1, 2)
    t = teacher.flatten(2).transpose(1, 2)
    m = s @ t.transpose(1, 2) / (s.norm(dim=2)[:, :, None] * t.norm(dim=2)[:, None, :] * temperature)
    normalised = m.exp() / m.exp().sum(dim=2, keepdim=True)
    return normalised.diagonal(dim1=1, dim2=2)


def features(b=2, c=5, h=6, w=7, dtype=torch.float64):
    return (torch.randn(b, c, h, w, dtype=dtype) for _ in range(2))


class TestDiagonalStatistics:
    def test_the_highest_value_is_reached_and_not_exceeded(self):
        x = torch.tensor([[[[3.0, -1.0, -2.0, -4.0]]]])
        d = softmax_diagonal(x, x, 2.0)
        found = diagonal_statistics(d, torch.tensor([[True, False, False, False]]), 2.0)
        assert found["normal"] == pytest.approx(found["highest"], rel=1e-6)
        assert found["anomalous"] == pytest.approx(d[0, 1].item()) and d.max() <= found["highest"] + 1e-7
        assert set(diagonal_statistics(d, None, 2.0)) == {"normal", "highest"}

    def test_at_256_pixels(self):
        assert diagonal_statistics(torch.rand(1, 256), None, 2.0)["highest"] == pytest.approx(
            0.0105, abs=1e-4
        )


class TestKD:
    def test_global_is_equation_1(self):
        t, s = features()
        expected = sum(1 - (a.flatten() @ b.flatten()) / (a.norm() * b.norm()) for a, b in zip(t, s)) / 2
        assert cosine_distance(t, s, reading="global").item() == pytest.approx(expected.item(), abs=1e-12)

    def test_pointwise_is_the_mean_over_positions(self):
        t, s = features()
        total = 0.0
        for b in range(2):
            for y in range(6):
                for x in range(7):
                    u, v = t[b, :, y, x], s[b, :, y, x]
                    total += 1 - (u @ v) / (u.norm() * v.norm())
        assert cosine_distance(t, s, reading="pointwise").item() == pytest.approx(
            total.item() / 84, abs=1e-12
        )

    def test_the_two_readings_differ(self):
        t, s = features()
        s = s * torch.rand(2, 1, 6, 7, dtype=torch.float64)  # a scale per position
        assert cosine_distance(t, s, reading="pointwise") != pytest.approx(
            cosine_distance(t, s, reading="global").item(), abs=1e-3
        )

    @pytest.mark.parametrize("reading", ["global", "pointwise"])
    def test_zero_for_a_scaled_copy_and_gradient(self, reading):
        t, s = features(b=1, h=2, w=2)
        assert cosine_distance(t, 3 * t, reading=reading).item() == pytest.approx(0, abs=1e-12)
        torch.autograd.gradcheck(
            lambda a, b: cosine_distance(a, b, reading=reading), (t.requires_grad_(), s.requires_grad_())
        )

    def test_unknown_reading(self):
        t, s = features()
        with pytest.raises(ValueError, match="global or pointwise"):
            cosine_distance(t, s, reading="both")


class TestDiagonalAndLogSumExp:
    @pytest.mark.parametrize("temperature", [2.0, 0.1, 0.01])
    @pytest.mark.parametrize("block", [16, 100, 900, 1 << 20])  # a row, some, an image, all images
    def test_matches_the_dense_matrix_and_its_gradients(self, monkeypatch, temperature, block):
        monkeypatch.setattr(similarity, "BLOCK_ELEMENTS", {"cpu": block})
        s, t = (
            F.normalize(torch.randn(2, 30, 5, dtype=torch.float64), dim=2).requires_grad_() for _ in range(2)
        )
        g1, g2 = torch.randn(2, 30, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
        m = s @ t.transpose(1, 2) / temperature
        dense = (m.diagonal(dim1=1, dim2=2), m.logsumexp(dim=2))
        ours = diagonal_and_logsumexp(s, t, temperature)
        for a, b in zip(ours, dense):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad((dense[0] * g1 + dense[1] * g2).sum(), (s, t))
        got = torch.autograd.grad((ours[0] * g1 + ours[1] * g2).sum(), (s, t))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("onednn", [True, False])
    @pytest.mark.parametrize(("images", "positions", "temperature"), [(1, 2048, 0.1), (3, 200, 0.01)])
    def test_float32(self, monkeypatch, onednn, images, positions, temperature):
        works = onednn and similarity._onednn_multiplies()
        monkeypatch.setattr(similarity, "_onednn_multiplies", lambda: works)
        s, t = (F.normalize(torch.randn(images, positions, 24), dim=2).requires_grad_() for _ in range(2))
        dense = (s.double() @ t.double().transpose(1, 2) / temperature).logsumexp(dim=2)
        _, lse = diagonal_and_logsumexp(s, t, temperature)
        torch.testing.assert_close(lse.double(), dense, rtol=1e-6, atol=1e-5)
        weight = torch.rand(images, positions)
        got = torch.autograd.grad((lse * weight).sum(), (s, t))
        wanted = torch.autograd.grad((dense * weight).sum(), (s, t))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 / temperature)

    @pytest.mark.parametrize("answer", [None, 1.0])
    def test_a_private_operator_that_is_gone_or_wrong_is_not_used(self, monkeypatch, answer):
        def product(a, b, bias):
            if answer is None:
                raise AttributeError("no such operator")
            return a @ b.T + answer

        monkeypatch.setattr(similarity, "_onednn_product", product)
        similarity._onednn_multiplies.cache_clear()
        try:
            s = F.normalize(torch.randn(1, 12, 3), dim=2)
            _, lse = diagonal_and_logsumexp(s, s, 1.0)
            assert not similarity._onednn_multiplies()
        finally:
            similarity._onednn_multiplies.cache_clear()
        torch.testing.assert_close(lse, (s @ s.transpose(1, 2)).logsumexp(dim=2))

    def test_no_gradient_for_a_detached_teacher(self):
        s, t = (F.normalize(torch.randn(1, 12, 3), dim=2) for _ in range(2))
        s.requires_grad_()
        diagonal_and_logsumexp(s, t, 1.0)[1].sum().backward()
        assert s.grad is not None and t.grad is None

    @pytest.mark.parametrize("onednn", [True, False])
    def test_never_holds_the_matrix(self, monkeypatch, onednn):
        """Peak memory of forward and backward stays far below one N x N matrix (N = 4096: 64 MB)."""
        from torch.profiler import ProfilerActivity, profile

        works = onednn and similarity._onednn_multiplies()
        monkeypatch.setattr(similarity, "_onednn_multiplies", lambda: works)
        s, t = (F.normalize(torch.randn(1, 4096, 8), dim=2).requires_grad_() for _ in range(2))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            diagonal_and_logsumexp(s, t, 0.1)[1].sum().backward()
        largest = max(event.cpu_memory_usage for event in prof.events())
        assert largest < 16 << 20

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="one shape"):
            diagonal_and_logsumexp(torch.ones(1, 3, 2), torch.ones(1, 4, 2), 1.0)


class TestContrastiveAndMargin:
    def test_equations_9_to_11_normals_only(self):
        s, t = features()
        d = dense_similarity(s, t, 0.5)
        ours = softmax_diagonal(s.float(), t.float(), 0.5).double()
        torch.testing.assert_close(ours, d, rtol=1e-4, atol=1e-7)
        assert contrastive_loss(d).item() == pytest.approx(-(d + 1e-8).log().mean().item())
        assert margin_loss(d, 1.0).item() == pytest.approx((1 - d).mean().item())
        assert margin_loss(d, 0.01).item() == pytest.approx((0.01 - d).clamp(min=0).mean().item())

    def test_mask_splits_normal_and_anomalous(self):
        d = torch.tensor([[0.9, 0.2, 0.8], [0.1, 0.6, 0.3]], dtype=torch.float64)
        normal = torch.tensor([[True, True, False], [False, False, True]])
        assert contrastive_loss(d, normal).item() == pytest.approx(
            -sum(math.log(v + 1e-8) for v in (0.9, 0.2, 0.3)) / 3
        )
        expected = (0.1 + 0.8 + 0.7) / 3 + (0.3 + 0.0 + 0.1) / 3  # tau - d, and d - tau / 2 where above it
        assert margin_loss(d, 1.0, normal).item() == pytest.approx(expected)

    def test_one_class_only(self):
        d = torch.tensor([[0.9, 0.2]], dtype=torch.float64)
        none, every = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
        assert contrastive_loss(d, none).item() == 0
        assert margin_loss(d, 1.0, none).item() == pytest.approx(0.2)
        assert margin_loss(d, 1.0, every).item() == pytest.approx(margin_loss(d, 1.0).item())
        assert contrastive_loss(d, every).item() == pytest.approx(contrastive_loss(d).item())

    def test_gradient_through_all(self):
        s, t = (x.requires_grad_() for x in features(b=2, c=3, h=2, w=3))
        normal = torch.tensor([[True] * 6, [False] * 6])

        def loss(a, b):
            u, v = (F.normalize(x.flatten(2).transpose(1, 2), dim=2) for x in (a, b))
            diagonal, lse = diagonal_and_logsumexp(u, v, 0.3)
            d = (diagonal - lse).exp()
            return contrastive_loss(d, normal) + margin_loss(d, 0.2, normal)

        torch.autograd.gradcheck(loss, (s, t))

    def test_positions_from_masks_of_another_size(self):
        mask = torch.zeros(2, 1, 32, 48)
        mask[1, 0, 9, 13] = 1  # one pixel: row 9 of 32 -> cell 1 of 4, column 13 of 48 -> cell 1 of 4
        normal = normal_positions((4, 4), label=None, mask=mask)
        assert normal[0].all() and normal[1].logical_not().nonzero().flatten().tolist() == [5]

    def test_positions_from_labels(self):
        assert normal_positions((2, 3), label=None, mask=None) is None
        assert normal_positions((2, 3), label=torch.tensor([0, -1]), mask=None).all()
        normal = normal_positions((2, 3), label=torch.tensor([0, 1]), mask=None)
        assert normal.shape == (2, 6) and normal[0].all() and not normal[1].any()


class TestTotal:
    def pairs(self, c=(4, 6, 8), sizes=(8, 4, 2)):
        return [
            Pair(torch.randn(2, k, n, n), torch.randn(2, k, n, n)) for _ in range(2) for k, n in zip(c, sizes)
        ]

    @pytest.mark.parametrize(("reduction", "expected"), [("released", 18.47), ("paper", 6.16)])
    @pytest.mark.parametrize("temperature", [2.0, 0.1])
    def test_closed_form_for_uniform_similarity_at_256(self, make_config, reduction, expected, temperature):
        """Constant features: d = 1 / N, so L_SC = log N and L_M = 1 - 1 / N at N = 4096, 1024, 256."""
        pairs = [Pair(torch.ones(1, 3, n, n), torch.ones(1, 3, n, n)) for _ in range(2) for n in (64, 32, 16)]
        config = make_config(loss__reduction=reduction, loss__temperature=temperature).loss
        parts = uninet_loss(pairs, config)
        exact = 0.6 * math.log(4096 * 1024 * 256) + 6 - 2 * (1 / 4096 + 1 / 1024 + 1 / 256)
        exact = exact if reduction == "released" else exact / 3
        assert parts["kd"].item() == pytest.approx(0, abs=1e-5)
        assert parts["total"].item() == pytest.approx(exact, abs=2e-3)
        assert parts["total"].item() == pytest.approx(expected, abs=6e-3)

    @pytest.mark.parametrize("kd", ["global", "pointwise"])
    def test_equation_12_against_dense(self, make_config, kd):
        pairs = self.pairs()
        config = make_config(loss__kd=kd, loss__temperature=0.4, loss__reduction="paper").loss
        parts = uninet_loss(pairs, config)
        d = [dense_similarity(p.student.double(), p.teacher.double(), 0.4) for p in pairs]
        sc = sum(-(x + 1e-8).log().mean() for x in d) / 3
        m = sum((1 - x).clamp(min=0).mean() for x in d) / 3
        distance = sum(cosine_distance(p.teacher.double(), p.student.double(), reading=kd) for p in pairs)
        assert parts["total"].item() == pytest.approx((0.7 * distance + 0.3 * sc + m).item(), rel=1e-5)

    def test_switches(self, make_config):
        pairs = self.pairs()
        off = uninet_loss(pairs, make_config(loss__terms=[]).loss)
        assert (
            off["sc"] == 0 and off["m"] == 0 and off["total"].item() == pytest.approx(0.7 * off["kd"].item())
        )

    @pytest.mark.parametrize(
        ("stop", "terms", "learns"),
        [("all", BOTH, False), ("kd", BOTH, True), ("kd", (), False), ("none", (), True)],
    )
    def test_stop_gradient(self, make_config, stop, terms, learns):
        """The teacher's gradient comes from L_KD, and from L_SC and L_M (`terms`)."""
        pairs = self.pairs()
        for p in pairs:
            p.teacher.requires_grad_()
        config = make_config(loss__stop_grad=stop, loss__terms=terms).loss
        total = uninet_loss(pairs, config)["total"]
        if total.requires_grad:
            total.backward()
        found = [p.teacher.grad is not None and bool(p.teacher.grad.abs().sum() > 0) for p in pairs]
        assert found == [learns] * len(pairs)

    def test_a_mask_of_zeros_changes_nothing(self, make_config):
        pairs, config = self.pairs(), make_config().loss
        free = uninet_loss(pairs, config)["total"]
        masked = uninet_loss(pairs, config, mask=torch.zeros(2, 1, 30, 30))["total"]
        torch.testing.assert_close(free, masked)
