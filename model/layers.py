"""Convolution with batch norm, and its exact folding into one convolution (Eq. 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


class SameConv2d(nn.Conv2d):
    """A convolution that keeps the size (divided by the stride); the map may be smaller than the kernel.

    Rows and columns of the kernel that then see nothing but padding are left out, which changes no result:
    oneDNN leaves their gradient unset in bf16 where it should be zero (torch 2.14, 7 x 7 on 2 x 2).
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        top, left = (max(0, p + 1 - n) for p, n in zip(self.padding, x.shape[2:], strict=True))
        if not top and not left:
            return super().forward(x)
        height, width = self.kernel_size
        weight = self.weight[:, :, top : height - top, left : width - left]
        padding = self.padding[0] - top, self.padding[1] - left
        return F.conv2d(x, weight, self.bias, self.stride, padding)


def conv_bn(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, bias: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size (divided by the stride) and its batch norm."""
    conv = SameConv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of a batch (2B, ...). `chunk` would do, but ties an exported graph to the batch size."""
    middle = x.shape[0] // 2
    return x[:middle], x[middle:]


def init_weights(module: nn.Module) -> None:
    """Kaiming normal (fan-out) for convolutions, 1 and 0 for batch norm; transposed ones keep theirs."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


@torch.no_grad()
def folded_weights(conv: nn.Conv2d | nn.ConvTranspose2d, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `norm(conv(x))` in eval mode (Eq. 3).

    omega^R = omega * gamma / sqrt(sigma^2 + eps), b^R = b + (bias - mu) * gamma / sqrt(sigma^2 + eps), with
    the convolution's own bias, zero in the paper. Computed in float64.
    """
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(factor)
    weight = conv.weight.double() * factor.view(shape)
    offset = norm.bias.double() + (bias - norm.running_mean.double()) * factor
    return weight.to(conv.weight.dtype), offset.to(conv.weight.dtype)


def fold(conv: nn.Conv2d | nn.ConvTranspose2d, norm: BatchNorm) -> nn.Module:
    """The convolution `conv` with `norm` folded in; replaces both."""
    weight, bias = folded_weights(conv, norm)
    conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


def fold_batch_norms(module: nn.Module) -> None:
    """Fold every batch norm that directly follows a convolution among the children of a module, in place.

    Children are taken in the order of registration, which in ResNets, EfficientNets and all models here is
    the order of use. timm's combined norm and activation keeps its activation.
    """
    previous: tuple[str, nn.Module] | None = None
    for name, child in list(module.named_children()):
        follows = isinstance(child, BatchNorm) and previous is not None
        if follows and isinstance(previous[1], nn.Conv2d | nn.ConvTranspose2d):
            setattr(module, previous[0], fold(previous[1], child))
            setattr(module, name, _activation_of(child))
        else:
            fold_batch_norms(child)
        previous = (name, child)


def _activation_of(norm: nn.Module) -> nn.Module:
    """Of timm's BatchNormAct2d, which ends with `drop` and `act`; nothing of a plain batch norm."""
    return nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
