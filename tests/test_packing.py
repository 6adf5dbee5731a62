"""Packed convolutions give what plain ones give; freed memory stays with the process."""

import copy
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from model import build_model
from model.layers import fold_batch_norms
from model.packing import PackedConv2d, pack_convolutions

NEEDS_ONEDNN = pytest.mark.skipif(
    not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"), reason="this torch has no oneDNN"
)


@NEEDS_ONEDNN
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_any_kind(kernel, groups, bias):
    conv = nn.Conv2d(8, 12, kernel, stride=2, padding=kernel // 2, groups=groups, bias=bias)
    expected = conv.requires_grad_(False)
    packed = pack_convolutions(
        nn.Sequential(nn.Conv2d(8, 8, 1), conv).requires_grad_(False), precision="fp32"
    )[1]
    assert isinstance(packed, PackedConv2d)
    with torch.inference_mode():
        for size in (16, 21):  # also another size than the one it was packed for
            x = torch.randn(2, 8, size, size).contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(packed(x), expected(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert packed(x).dtype == torch.float32  # as it was packed


@NEEDS_ONEDNN
def test_in_the_precision_of_autocast():
    conv = nn.Conv2d(3, 5, 3).requires_grad_(False)
    packed, x = PackedConv2d(conv), torch.randn(1, 3, 9, 9)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        torch.testing.assert_close(packed(x), conv(x), rtol=2e-2, atol=2e-2)


@NEEDS_ONEDNN
@pytest.mark.parametrize("name", ["uninet", "recontrast", "unias", "memory-bank"])
def test_a_deployed_model_predicts_the_same(make_config, name):
    config = make_config(model__name=name, model__width=0.5)
    model = build_model(config).eval()
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    if name == "memory-bank":
        model.fit([images], seed=0)
    plain, packed = model.deploy(), pack_convolutions(model.deploy(), precision="fp32")
    with torch.inference_mode():
        for batch in (images, images[:1]):
            expected, found = plain.predict(batch), packed.predict(batch)
            torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-4)


class _Residual(nn.Module):
    """Sums, ReLUs and uses of a convolution's output as blocks have them, and as none should have them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm = kind, nn.Identity()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        first = F.relu(self.norm(self.a(x)))
        if self.kind == "sum of input":
            return F.relu(self.b(first) + x)
        if self.kind == "sum of two convolutions":
            y = self.norm(self.b(first))
            y += self.c(x)
            return F.relu(y)
        if self.kind == "sum with what is computed later":
            y = self.b(first)
            return F.relu(y + torch.tanh(x))
        if self.kind == "sum with itself":
            y = self.b(first)
            return F.relu(y + y)
        if self.kind == "used before and after ReLU":
            y = self.b(first)
            return F.relu(y) - y
        if self.kind == "used before and after the sum":
            y = self.b(first)
            return F.relu(y + x) * y
        if self.kind == "no ReLU":
            return self.b(first) + x
        if self.kind == "called twice":
            return F.relu(self.b(self.b(first)))
        assert self.kind == "a sum that widens"
        return F.relu(self.b(first.mean((2, 3), keepdim=True)) + x)


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    ("kind", "left"),  # sums and ReLUs that stay operations of their own
    [
        ("sum of input", 0),
        ("sum with what is computed later", 2),
        ("sum with itself", 2),
        ("used before and after ReLU", 1),
        ("used before and after the sum", 2),
        ("no ReLU", 0),
        ("called twice", 1),
        ("sum of two convolutions", 0),
        ("a sum that widens", 0),  # done by the convolution, in steps
    ],
)
def test_sums_and_relus_join_the_convolution_where_they_can(kind, left):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Sequential(_Residual(kind))).eval().requires_grad_(False)
    packed = pack_convolutions(copy.deepcopy(plain), precision="fp32")
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    names = [str(getattr(n.target, "__name__", n.target)) for n in packed[0].graph.nodes]
    assert sum(name in ("relu", "add", "iadd") for name in names) == left, names


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("resnet18", True),
        ("wide_resnet50_2", True),
        ("tf_efficientnet_lite0", True),
        ("convnext_atto", False),
        ("swin_tiny_patch4_window7_224", False),
    ],
)
def test_features_of_any_backbone_stay(name, is_fused):
    torch.manual_seed(0)
    size = 224 if "224" in name else 64
    net = timm.create_model(name, features_only=True, pretrained=False).eval().requires_grad_(False)
    plain = nn.Sequential()
    plain.net = net
    fold_batch_norms(plain)
    packed = pack_convolutions(copy.deepcopy(plain), precision="fp32")
    assert sum(p.then[0] != "none" for p in packed.modules() if isinstance(p, PackedConv2d)) >= is_fused * 10
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for found, expected in zip(packed.net(x), plain.net(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_a_model_that_still_learns_is_left_alone():
    model = pack_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1)), precision="fp32")
    assert type(model[0]) is nn.Conv2d


@NEEDS_ONEDNN
def test_bf16_on_a_processor_without_it_is_left_alone(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        net = pack_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1)).requires_grad_(False), precision="bf16")
        assert isinstance(net[0], PackedConv2d) == there


REUSE = """
import resource, sys, torch
from utils.device import keep_freed_memory
set_ = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(20):  # aligned blocks leave small gaps; it takes some rounds until one fits into an old one
    torch.empty(1 << 24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.empty(1 << 24).fill_(1)
print(int(set_), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be told")
def test_freed_memory_is_used_again():
    faults = {}
    for how in ("keep", "default"):
        words = [sys.executable, "-c", REUSE, how]
        told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        faults[how] = int(told[1])
        if how == "keep" and told[0] == "0":
            pytest.skip("this C library cannot be told")
    assert faults["keep"] * 20 < faults["default"], faults
