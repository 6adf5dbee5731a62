"""A convolution whose kernel is wider than the map gives what the plain one gives."""

import pytest
import torch
from torch import nn

from model.layers import SameConv2d


def gradients(conv, x, **autocast):
    conv.zero_grad()
    with torch.autocast("cpu", **autocast):
        y = conv(x)
    y.backward(torch.ones_like(y))
    return y.detach().float(), conv.weight.grad.clone()


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (2, 5), (3, 3), (4, 4), (8, 8)])
def test_output_and_gradient(kernel, stride, size):
    torch.manual_seed(0)
    words = {"stride": stride, "padding": kernel // 2, "dtype": torch.float64}
    conv, plain = SameConv2d(3, 5, kernel, **words), nn.Conv2d(3, 5, kernel, **words)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    found, expected = (gradients(c, x, enabled=False) for c in (conv, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="no oneDNN, or a processor without bf16; the fault was there",
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradient_in_bf16_is_set_everywhere(size):
    torch.manual_seed(0)
    conv = SameConv2d(160, 160, 7, padding=3, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(8, 160, size, size).contiguous(memory_format=torch.channels_last)
    _, expected = gradients(conv, x, enabled=False)
    for _ in range(8):
        # what is not set shows this
        waste = [torch.full((2 * conv.weight.numel(),), torch.nan) for _ in range(3)]
        del waste
        _, found = gradients(conv, x, dtype=torch.bfloat16)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
