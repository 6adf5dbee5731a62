"""Packed convolutions give what plain ones give."""

import pytest
import torch
from torch import nn

from model import build_model
from model.layers import SameConv2d
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
@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor packs no bf16 weights"
)
def test_in_the_precision_of_autocast():
    conv = nn.Conv2d(3, 5, 3).requires_grad_(False)
    packed, x = PackedConv2d(conv), torch.randn(1, 3, 9, 9)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert packed(x).dtype == torch.bfloat16
        torch.testing.assert_close(packed(x), conv(x), rtol=2e-2, atol=2e-2)


@NEEDS_ONEDNN
@pytest.mark.parametrize(
    "name", ["uninet", "recontrast", pytest.param("unias", marks=pytest.mark.slow), "memory-bank"]
)
def test_a_deployed_model_predicts_the_same(make_config, name):
    config = make_config(model__name=name, model__width=0.5)
    model = build_model(config).eval()
    images = torch.randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    if name == "memory-bank":
        model.fit([images.flip(0, 3)], seed=0)  # near 0 distances are all rounding
    plain, packed = model.deploy(), pack_convolutions(model.deploy(), precision="fp32")
    with torch.inference_mode():
        for batch in (images, images[:1]):
            expected, found = plain.predict(batch), packed.predict(batch)
            torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, SameConv2d) for module in packed.modules())


def test_a_model_that_still_learns_is_left_alone():
    model = pack_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1)), precision="fp32")
    assert type(model[0]) is nn.Conv2d


@NEEDS_ONEDNN
def test_bf16_on_a_processor_without_it_is_left_alone(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda there=there: there)
        net = pack_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1)).requires_grad_(False), precision="bf16")
        assert isinstance(net[0], PackedConv2d) == there
