"""The model's parts against their equations, and the wiring."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import levels
from scipy.ndimage import gaussian_filter
from torch import nn

from model import build_model
from model.backbone import build_backbone
from model.bottleneck import MEM, Bottleneck, LargeKernelConv
from model.decision import Decision, decision_weight, distance_map, gaussian_blur, top_mean
from model.dfs import DomainRelatedFeatureSelection, selection_weight
from model.layers import conv_bn, fold, fold_batch_norms
from model.student import Student
from model.teachers import FeatureStandardizer

WRN = (256, 512, 1024)


def shake(module):
    """Give batch norms statistics and weights that are not the identity."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.eval()


class TestFolding:
    def test_equation_3_by_hand(self):
        block = shake(conv_bn(3, 4, 3))
        conv, norm = copy.deepcopy(block)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        folded = fold(*block)
        torch.testing.assert_close(folded.weight, conv.weight * factor.view(-1, 1, 1, 1))
        torch.testing.assert_close(folded.bias, norm.bias - norm.running_mean * factor)

    @pytest.mark.parametrize("make", [
        lambda: conv_bn(4, 6, 3, stride=2, bias=True),
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6)),
        lambda: LargeKernelConv(4, 6, large=7, small=3, stride=2),
    ])  # fmt: skip
    def test_same_output(self, make):
        block = shake(make()).double()
        x = torch.randn(2, 4, 16, 16, dtype=torch.float64)
        before = block(x)
        if isinstance(block, LargeKernelConv):
            after = block.deployed()
        else:
            fold_batch_norms(block.eval(), x)
            after = block
        torch.testing.assert_close(after(x), before, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("kind", "left"), [("order", 0), ("twice", 1), ("reused", 1), ("weights", 1)])
    def test_what_follows_what_is_seen_as_it_runs(self, kind, left, caplog):
        """Registered in another order than used; a convolution used twice, or whose output is; one that is no
        plain convolution.
        """

        class Standardised(nn.Conv2d):
            def forward(self, x):
                return nn.functional.conv2d(x, self.weight - self.weight.mean(), padding=1)

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = (Standardised if kind == "weights" else nn.Conv2d)(4, 4, 3, padding=1)
                self.second = nn.Conv2d(4, 4, 3, padding=1)
                self.norm = nn.BatchNorm2d(4)  # of the first

            def forward(self, x):
                y = self.first(x)
                z = self.second(self.norm(y).relu())
                return [self.first(z) if kind == "twice" else z, z + 1e-2 * y if kind == "reused" else z]

        block, x = shake(Block()), torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            before = block(x)
            fold_batch_norms(block, x)
            after = block(x)
        for a, b in zip(after, before, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in block.modules()) == left
        assert ("left as " in caplog.text) == (kind in ("reused", "weights"))

    def test_a_backbone_that_registers_in_another_order(self):
        net = shake(timm.create_model("repvit_m0_9", features_only=True, out_indices=(1,)))
        x, count = torch.randn(1, 3, 64, 64), sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        with torch.no_grad():
            (before,) = net(x)
            fold_batch_norms(net, x)
            (after,) = net(x)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) < count / 2

    @pytest.mark.parametrize("reparam", ["none", "parallel", "construct"])
    def test_whole_model(self, make_config, reparam):
        model = shake(build_model(make_config(model__mem_reparam=reparam)))
        x = torch.randn(2, 3, 64, 64)
        deployed = model.deploy()
        assert not any(isinstance(m, nn.BatchNorm2d | LargeKernelConv) for m in deployed.modules())
        with torch.inference_mode():
            a, b = model.predict(x), deployed.predict(x)
        torch.testing.assert_close(a.anomaly_map, b.anomaly_map, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.score, b.score, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="deploy"):
            deployed.train()


def parameters(module):
    return sum(p.numel() for p in module.parameters())


class TestShapesAndSizes:
    """Parameter counts of WideResNet50-2 as counted from the public code's used layers."""

    @pytest.mark.parametrize(("options", "expected"), [
        ({"kernels": (3, 3), "reparam": "construct"}, 70_422_528),
        ({"kernels": (3, 3)}, 70_419_456),
        ({"kernels": (3, 5)}, 112_362_496),
        ({"kernels": (3, 7)}, 175_277_056),
        ({"kernels": (3, 11)}, 364_020_736),
        ({"kernels": None}, 58_885_120),
    ])  # fmt: skip
    def test_bottleneck(self, options, expected):
        with torch.device("meta"):
            bottleneck = Bottleneck(levels(*WRN), **options)
            out = bottleneck([torch.empty(2, c, 64 // 2**i, 64 // 2**i) for i, c in enumerate(WRN)])
        assert parameters(bottleneck) == expected
        assert out.shape == (2, 2048, 8, 8)

    def test_student(self):
        with torch.device("meta"):
            student = Student(levels(*WRN), 2048)
            shapes = [tuple(f.shape) for f in student(torch.empty(2, 2048, 8, 8), [])]
        assert parameters(student) == 24_917_504
        assert shapes == [(2, 256, 64, 64), (2, 512, 32, 32), (2, 1024, 16, 16)]

    @pytest.mark.slow
    def test_wide_resnet_teacher_has_torchvisions_names(self):
        with torch.device("meta"):
            names = torchvision.models.wide_resnet50_2().state_dict()
        net, info = build_backbone("wide_resnet50_2", (4, 8, 16), random_weights=True)
        assert parameters(net) == 24_862_528 and info.channels == WRN and not info.signed
        assert info.mean == pytest.approx((0.485, 0.456, 0.406))
        assert all(v.shape == names[k].shape for k, v in net.state_dict().items())

    @pytest.mark.parametrize("size", [(64, 64), (64, 96)])
    @pytest.mark.parametrize("width", [1.0, 2.5])
    def test_small_backbone(self, make_config, size, width):
        model = build_model(make_config(model__width=width)).eval()
        pairs = model.features(torch.randn(2, 3, *size))
        assert len(pairs) == 6 and all(t.shape == s.shape for _, t, s in pairs)
        assert pairs[0][1].shape[2:] == (size[0] // 4, size[1] // 4)
        prediction = model.predict(torch.randn(2, 3, *size))
        assert prediction.anomaly_map.shape == (2, *size) and prediction.score.shape == (2,)

    def test_mem_splits_the_channels(self):
        mem = MEM(8, 16, stride=1, kernels=(3, 7), reparam="none")
        assert mem.small[0][0].weight.shape == (4, 4, 3, 3) and mem.large[0][0].weight.shape == (4, 4, 7, 7)
        construct = MEM(8, 16, stride=1, kernels=(3, 7), reparam="construct").large[0][0]
        assert construct.weight.shape == (4, 4, 3, 3) and construct.bias is not None


class TestDFS:
    def test_equations_4_to_6(self):
        teacher, student = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
        dfs = DomainRelatedFeatureSelection((3,), mode="prior", learnable=True)
        with torch.no_grad():
            dfs.theta[0].copy_(torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1))
        expected = torch.empty_like(student)
        for b in range(2):
            for c in range(3):
                f = teacher[b, c]
                rho = teacher.max()
                w = (f - rho).exp() / (f - rho).exp().sum()
                expected[b, c] = student[b, c] * w * ([0.5, 1.0, 2.0][c] + f.mean())
        torch.testing.assert_close(dfs(student, teacher, 0), expected)
        assert selection_weight(teacher).sum(dim=(2, 3)).flatten().tolist() == pytest.approx([1.0] * 6)

    def test_modes(self):
        teacher, student = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)

        def select(mode):
            return DomainRelatedFeatureSelection((2,), mode=mode, learnable=False)

        assert select("none")(student, teacher, 0) is student
        torch.testing.assert_close(
            select("all")(student, teacher, 0), student * (1 + teacher.mean((2, 3), keepdim=True))
        )
        teacher.requires_grad_()
        assert select("prior")(student, teacher, 0).requires_grad

    def test_theta_is_registered(self):
        learnt, fixed = (
            DomainRelatedFeatureSelection((2,), mode="prior", learnable=learnable)
            for learnable in (True, False)
        )
        assert "theta.0" in learnt.state_dict() and learnt.theta[0].requires_grad
        assert not fixed.theta[0].requires_grad and fixed.theta[0].flatten().tolist() == [1.0, 1.0]


class TestDecision:
    def maps(self, maxima):
        return [torch.stack([torch.full((2, 2), v[i]) for v in maxima]) for i in range(len(maxima[0]))]

    def test_equation_14_by_hand(self):
        """Maxima 1, 1, 1, 0, 0, 0: p = e / (3 e + 3) for the first three, which are above the mean 1 / 6."""
        maps = self.maps([[1.0, 1, 1, 0, 0, 0]])
        p = np.e / (3 * np.e + 3)
        weight = decision_weight(maps, values="probability", alpha=0.5, beta=0.01)
        assert weight.item() == pytest.approx(0.5 * p, rel=1e-6)
        assert decision_weight(maps, values="distance", alpha=0.5, beta=0.01).item() == pytest.approx(0.5)
        assert decision_weight(maps, values="probability", alpha=0.01, beta=0.03).item() == pytest.approx(
            0.03
        )

    def test_printed_constants_always_give_beta(self):
        maps = [torch.rand(50, 3, 3) * 2 for _ in range(6)]
        assert (decision_weight(maps, values="probability", alpha=0.01, beta=0.03) == 0.03).all()

    def test_all_equal_is_a_number(self):
        weight = decision_weight(self.maps([[0.4] * 6]), values="distance", alpha=1.0, beta=0.0)
        assert weight.item() == pytest.approx(0.4)

    def test_each_image_for_itself(self):
        maps = [torch.rand(4, 3, 3) for _ in range(6)]
        together = decision_weight(maps, values="distance", alpha=0.3, beta=0.0)
        alone = [
            decision_weight([m[i : i + 1] for m in maps], values="distance", alpha=0.3, beta=0.0)
            for i in range(4)
        ]
        torch.testing.assert_close(together, torch.cat(alone))

    def test_top_mean_against_a_loop(self):
        maps, share = torch.randn(5, 7, 9), torch.tensor([0.0, 0.02, 0.1, 0.5, 1.0])
        expected = []
        for m, part in zip(maps, share.double()):
            count = max(1, int(part * 63))
            expected.append(m.flatten().sort(descending=True).values[:count].mean())
        torch.testing.assert_close(top_mean(maps, share), torch.stack(expected))

    @pytest.mark.parametrize(("height", "width"), [(20, 50), (100, 100), (320, 320), (10, 10)])
    def test_counts_are_whole_where_the_share_of_the_pixels_is(self, height, width):
        pixels = height * width
        values = torch.randperm(pixels).float().view(1, height, width)
        descending = values.flatten().sort(descending=True).values.double()
        shares = {"top1": 1, "top3": 3, "top5": 5, "top10": 10, "mean": 100}
        decided = {percent: self.decide(decision=name) for name, percent in shares.items()}
        decided[29] = self.decide(alpha=0.0, beta=0.29)
        for percent, decide in decided.items():
            score = decide([values], (height, width)).score
            assert score.item() == descending[: percent * pixels // 100].mean().float().item()
            found = top_mean(values, torch.tensor([percent / 100]))  # float32
            assert found.item() == score.item()

    @pytest.mark.parametrize("sigma", [0.7, 4.0])
    def test_blur_is_scipys(self, sigma):
        maps = np.random.default_rng(0).normal(size=(2, 20, 33))
        expected = np.stack([gaussian_filter(m, sigma) for m in maps])
        np.testing.assert_allclose(gaussian_blur(torch.from_numpy(maps), sigma).numpy(), expected, atol=1e-12)

    def decide(self, **changes):
        values = {"decision": "weighted-distance", "alpha": 0.01, "beta": 0.03}
        values |= {"score_sigma": 0.0, "map_sigma": 0.0}
        return Decision(**(values | changes))

    @pytest.mark.parametrize(
        ("name", "share"), [("max", 0), ("top1", 0.01), ("top3", 0.03), ("top5", 0.05), ("top10", 0.1)]
    )
    def test_fixed_fractions_of_table_5(self, name, share):
        maps = [torch.rand(3, 4, 4), torch.rand(3, 8, 8)]
        prediction = self.decide(decision=name)(maps, (32, 32))
        total = sum(
            nn.functional.interpolate(m[:, None], size=32, mode="bilinear", align_corners=True)[:, 0]
            for m in maps
        )
        torch.testing.assert_close(prediction.anomaly_map, total)
        torch.testing.assert_close(prediction.score, top_mean(total, torch.full((3,), share)))

    def test_score_and_map_are_smoothed_apart(self):
        maps = [torch.rand(2, 16, 16)]
        plain, score = self.decide()(maps, (16, 16)), self.decide(score_sigma=2.0)(maps, (16, 16))
        torch.testing.assert_close(plain.anomaly_map, score.anomaly_map)
        assert (score.score < plain.score).all()
        both = self.decide(map_sigma=2.0)(maps, (16, 16))
        torch.testing.assert_close(both.score, plain.score)
        torch.testing.assert_close(both.anomaly_map, gaussian_blur(plain.anomaly_map, 2.0))

    def test_autocast_does_not_round_scores(self):
        maps, decide = [torch.rand(4, 16, 16)], self.decide(score_sigma=2.0, map_sigma=1.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = decide(maps, (32, 32))
        exact = decide(maps, (32, 32))
        assert torch.equal(rounded.score, exact.score) and torch.equal(rounded.anomaly_map, exact.anomaly_map)

    def test_legacy_map(self):
        maps = [torch.rand(2, 8, 8)]
        prediction = self.decide(decision="max", score_map="legacy_exp")(maps, (8, 8))
        total = prediction.anomaly_map
        torch.testing.assert_close(prediction.score, (1 - (total.amin((1, 2)) - total.amax((1, 2))).exp()))

    def test_distance_map(self):
        t, s = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2, 2)
        expected = 1 - (t[0, :, 1, 0] @ s[0, :, 1, 0]) / (t[0, :, 1, 0].norm() * s[0, :, 1, 0].norm())
        assert distance_map(t, s)[0, 1, 0].item() == pytest.approx(expected.item(), abs=1e-6)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_distance_map_is_one_minus_torchs_cosine(self, layout):
        t, s = (torch.randn(2, 24, 5, 7).contiguous(memory_format=layout) for _ in range(2))
        t[0, :, 0, 0] = s[1, :, 2, 3] = 0  # nothing to compare
        t[0, :, 1, 1] = 100 * s[0, :, 1, 1]  # the same direction
        expected = 1 - F.cosine_similarity(t.double(), s.double(), dim=1)
        found = distance_map(t, s)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert found[0, 0, 0] == 1 and found[1, 2, 3] == 1 and abs(found[0, 1, 1]) < 1e-6


class TestFeatureStandardizer:
    @pytest.mark.parametrize("gain", [None, 0.5])
    def test_statistics(self, gain):
        data = [
            [torch.randn(4, 3, 8, 8) * torch.tensor([1.0, 5, 0.2]).view(1, 3, 1, 1) + 2] for _ in range(3)
        ]
        scale = FeatureStandardizer((3,), gain=gain)
        scale.fit(iter(data))
        out = torch.cat([scale(batch)[0] for batch in data])
        if gain is None:
            assert torch.equal(out, torch.cat([batch[0] for batch in data]))
        else:
            assert out.std((0, 2, 3)).tolist() == pytest.approx([0.5] * 3, rel=1e-2)

    def test_a_dead_channel_stays_finite(self):
        scale = FeatureStandardizer((2,), gain=1.0)
        x = torch.randn(2, 2, 4, 4)
        x[:, 1] = 1e-9
        scale.fit([[x]])
        assert torch.isfinite(scale([x])[0]).all() and scale([x])[0][:, 1].abs().max() < 1e-3


class TestWiring:
    def test_cross_pairing(self, make_config):
        """What is decoded from the target's features is compared with the source teacher, and vice versa."""
        model = build_model(make_config()).eval()
        with torch.no_grad():
            for p in model.teachers.target.parameters():
                p.add_(0.05 * torch.randn_like(p))
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            source, target = model.teachers(x)
            from_target = model.student(model.bottleneck(target), target)
            from_source = model.student(model.bottleneck(source), source)
            pairs = model.features(x)
        for level in range(3):
            for (found_level, teacher, student), expected in (
                (pairs[level], (source[level], from_target[level])),
                (pairs[level + 3], (target[level], from_source[level])),
            ):
                assert found_level == level
                torch.testing.assert_close(teacher, expected[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(student, expected[1], rtol=1e-3, atol=1e-3)

    def test_what_a_step_moves(self, make_config):
        config = make_config(optim__lr_teacher=1e-3)
        model = build_model(config).train()
        before = copy.deepcopy(model.state_dict())
        groups = model.parameter_groups(config.optim)
        assert [(g["name"], g["lr"]) for g in groups] == [("student", 5e-3), ("teacher", 1e-3)]
        optimizer = torch.optim.AdamW(groups)
        model.loss({"image": torch.randn(4, 3, 64, 64)}, 0.0)["total"].backward()
        optimizer.step()
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert {"dfs.theta.0", "dfs.theta.1", "dfs.theta.2"} <= moved  # theta learns
        assert any(k.startswith("teachers.target") for k in moved)
        assert not any(k.startswith("teachers.source") for k in moved)  # neither weights nor statistics
        assert {k for k in moved if k.startswith("student")} and {
            k for k in moved if k.startswith("bottleneck")
        }

    def test_released_theta_stays(self, make_config):
        model = build_model(make_config(model__flavor="released"))
        model.loss({"image": torch.randn(2, 3, 64, 64)}, 0.0)["total"].backward()
        assert all(theta.grad is None for theta in model.dfs.theta)

    def test_batch_norm_modes(self, make_config):
        model = build_model(make_config())
        model.train()
        norms = {name: m.training for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert not any(v for k, v in norms.items() if k.startswith("teachers.source"))
        assert all(v for k, v in norms.items() if not k.startswith("teachers.source"))
        assert not any(m.training for m in model.eval().modules())

    def test_each_image_alone(self, make_config):
        model = shake(build_model(make_config()))
        x = torch.randn(3, 3, 64, 64)
        with torch.inference_mode():
            together = model.predict(x)
            alone = [model.predict(x[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(together.score, torch.cat([p.score for p in alone]), rtol=1e-4, atol=1e-5)

    def test_maps_compare_raw_student_features(self, make_config):
        """DFS selects for the losses alone, as in the released code."""
        model, x = shake(build_model(make_config())), torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            maps = [distance_map(t, s) for _, t, s in model.features(x)]
            expected = model.decision(maps, (64, 64)).anomaly_map
            torch.testing.assert_close(model.predict(x).anomaly_map, expected)


class TestBackbone:
    def test_lite0_weights_map_one_to_one_and_see(self):
        """The package's weights under timm's names recognise a cat among a thousand classes."""
        timm = pytest.importorskip("timm")
        from PIL import Image
        from skimage import data

        from model.backbone import lite0_state_dict

        state = lite0_state_dict()
        net = timm.create_model("tf_efficientnet_lite0").eval()
        assert len(state) == 247 == sum(not k.endswith("num_batches_tracked") for k in net.state_dict())
        net.load_state_dict(state, strict=False)
        image = np.asarray(
            Image.fromarray(data.cat()).resize((224, 224), Image.Resampling.BICUBIC), np.float32
        )
        with torch.inference_mode():
            classes = net(torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]).topk(3).indices[0]
        assert set(classes.tolist()) & {281, 282, 283, 284, 285}  # ImageNet's domestic cats

    def test_features_of_both_signs(self):
        _, info = build_backbone("tf_efficientnet_lite0", (4, 8, 16), random_weights=True)
        assert info.channels == (24, 40, 112) and info.signed and info.std == (0.5, 0.5, 0.5)

    @torch.no_grad()
    def test_stages_that_no_feature_needs_are_gone(self):
        """timm's EfficientNets compute them all; states of before hold them."""
        torch.manual_seed(0)
        whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3)).eval()
        net, _ = build_backbone("tf_efficientnet_lite0", (4, 8, 16), random_weights=True)
        sizes = [sum(p.numel() for p in each.parameters()) for each in (whole, net)]
        assert len(whole.blocks) == 7 and len(net.blocks) == 5 and sizes[1] < 0.3 * sizes[0]
        outer = copy.deepcopy(nn.ModuleDict({"teacher": net.eval()}))  # as a model holds it
        outer.load_state_dict({f"teacher.{key}": value for key, value in whole.state_dict().items()})
        image = torch.randn(1, 3, 64, 64)
        for ours, theirs in zip(outer["teacher"](image), whole(image), strict=True):
            assert torch.equal(ours, theirs)
        with pytest.raises(RuntimeError, match="blocks.4.9.x"):
            net.load_state_dict(whole.state_dict() | {"blocks.4.9.x": torch.ones(1)})

    def test_local_weights(self, tmp_path):
        net, _ = build_backbone("resnet18", (4,), random_weights=True)
        state = {k: torch.full_like(v, 0.5) for k, v in net.state_dict().items()} | {
            "fc.weight": torch.ones(2, 2)
        }
        torch.save(state, tmp_path / "w.pth")
        loaded, _ = build_backbone("resnet18", (4,), weights=str(tmp_path / "w.pth"))
        assert all((p == 0.5).all() for p in loaded.parameters())

    def test_weights_of_another_backbone(self, tmp_path):
        torch.save({"conv1.weight": torch.ones(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="no state dict of this backbone: it lacks conv_stem"):
            build_backbone("tf_efficientnet_lite0", (4,), weights=str(tmp_path / "other.pth"))
        with pytest.raises(OSError, match="no weights file"):
            build_backbone("resnet18", (4,), weights=str(tmp_path / "none.pth"))
        (tmp_path / "bad.pth").write_bytes(b"no tensor")
        with pytest.raises(ValueError, match="no plain PyTorch state dict"):
            build_backbone("resnet18", (4,), weights=str(tmp_path / "bad.pth"))

    @pytest.mark.parametrize(("name", "other", "message"), [
        ("resnet18", "resnet34", r"it also holds layer1\.2\.conv1\.weight"),
        ("resnet34", "resnet18", r"it lacks layer1\.2\.conv1\.weight"),
        ("resnet18", "resnet50", r"another shape for layer1\.0\.conv1\.weight"),
        ("efficientnet_b0", "efficientnet_b1", r"it also holds blocks\.0\.1\."),
        ("convnext_atto", "convnext_femto", "another shape for"),
    ])  # fmt: skip
    def test_weights_of_another_depth(self, tmp_path, name, other, message):
        with torch.device("meta"):
            state = timm.create_model(other).state_dict()
        torch.save({k: torch.zeros(v.shape) for k, v in state.items()}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            build_backbone(name, (4, 8, 16), image_size=(64, 64), weights=str(tmp_path / "w.pth"))

    @pytest.mark.parametrize(("name", "strides", "prefix"), [
        ("convnext_atto", (4, 8, 16), "module._orig_mod.backbone."), ("mambaout_femto", (4, 8, 16), ""),
        ("regnetx_002", (4, 8), "model."), ("vit_tiny_patch16_224", (16,), ""), ("levit_128s", (16, 32), ""),
    ])  # fmt: skip
    def test_its_own_state_dict(self, tmp_path, name, strides, prefix):
        """As timm saves it, whatever features_only renames; in a checkpoint of a wrapped model."""
        state = timm.create_model(name).state_dict()
        tree = {prefix + key: value for key, value in state.items()}
        torch.save({"model": tree | {"neck.weight": torch.ones(1)}} if prefix else tree, tmp_path / "w.pth")
        net, _ = build_backbone(name, strides, image_size=(224, 224), weights=str(tmp_path / "w.pth"))
        plain = {key.replace(".", "_"): value for key, value in state.items()}
        found = net.state_dict()
        for key, value in found.items():
            assert torch.equal(
                value, plain[key.removeprefix("net.").removeprefix("model.").replace(".", "_")]
            )
        assert len(found) > 20

    def test_positions_of_another_image_size(self, tmp_path):
        torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
        weights = {"weights": str(tmp_path / "w.pth")}
        net, info = build_backbone("vit_tiny_patch16_224", (16,), image_size=(64, 96), **weights)
        assert net(torch.zeros(1, 3, 64, 96))[0].shape == (1, 192, 4, 6) and info.channels == (192,)

    @pytest.mark.parametrize(("name", "channels"), [
        ("swin_tiny_patch4_window7_224", (96, 192, 384)),  # one image size, channels last
        ("mambaout_femto", (48, 96, 192)),  # channels last
        ("dla34", (64, 128, 256)),  # its list of features begins at the second
    ])  # fmt: skip
    def test_layout_size_and_strides_are_as_told(self, name, channels):
        net, info = build_backbone(name, (4, 8, 16), image_size=(96, 64), random_weights=True)
        shapes = [tuple(f.shape[1:]) for f in net.eval()(torch.zeros(1, 3, 96, 64))]
        assert info.channels == channels
        assert shapes == [(c, 96 // s, 64 // s) for c, s in zip(channels, info.strides, strict=True)]

    @pytest.mark.parametrize(("name", "strides", "more", "message"), [
        ("inception_v3", (4, 8, 16), {}, r"of shape \[192, 12, 12\] at stride 4, .* need \[192, 16, 16\]"),
        ("vit_tiny_patch16_224", (8, 16), {}, r"has strides \[16\], asked for \[8, 16\]"),
        ("vit_tiny_patch16_224", (16,), {"other_sizes": [(96, 96)]}, "takes no images of 96 x 96"),
        ("swin_tiny_patch4_window7_224", (4,), {"image_size": (66, 66)}, "images of 66 x 66"),
    ])  # fmt: skip
    def test_what_does_not_fit_is_one_line(self, name, strides, more, message):
        with pytest.raises(ValueError, match=message) as error:
            build_backbone(name, strides, random_weights=True, **({"image_size": (64, 64)} | more))
        assert "\n" not in str(error.value)

    def test_download_that_fails_says_what_to_do(self, monkeypatch):
        real = timm.create_model

        def offline(name, *args, pretrained=False, **kwargs):
            if pretrained:
                raise ConnectionError("no network")
            return real(name, *args, pretrained=False, **kwargs)

        monkeypatch.setattr("model.backbone.timm.create_model", offline)
        with pytest.raises(
            OSError, match=r"--weights FILE \(torchvision's wide.*--backbone tf_efficientnet_lite0"
        ):
            build_backbone("wide_resnet50_2", (4, 8, 16))

    def test_wrong_names(self):
        with pytest.raises(ValueError, match="unknown backbone"):
            build_backbone("wide_resnet_fifty", (4,))
        with pytest.raises(ValueError, match="has strides"):
            build_backbone("tf_efficientnet_lite0", (3, 8), random_weights=True)


def test_a_seed_gives_the_same_model_whatever_was_built_before(make_config):
    """The runs of several categories are built in one process, and each may be run again alone."""
    config, found = make_config(), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(build_model(config, pretrained=False).state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
