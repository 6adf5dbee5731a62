"""The bottleneck: multi-scale fusion, then three multi-scale embedding modules, MEM (Sec. 4.2, Fig. 2).

Legend: B images, C_i channels of level i of n, w width. Input: one (B, C_i, H_i, W_i) per level, fine to
coarse. Output: (B, 2 w C_n, H_n / 2, W_n / 2).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backbone import BackboneInfo
from model.layers import conv_bn, folded_weights, init_weights

Kernels = tuple[int, int] | None  # of MEM; None: the block of reverse distillation


class LargeKernelConv(nn.Module):
    """k x k convolution with batch norm, trained beside a small one (RepLKNet, the paper's reference [15]).

    `deployed` pads the folded small kernel into the folded large one: exact, unlike a 7 x 7 made a 3 x 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, large: int, small: int, stride: int) -> None:
        super().__init__()
        assert small <= large
        self.large = conv_bn(in_channels, out_channels, large, stride=stride)
        self.small = conv_bn(in_channels, out_channels, small, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        return self.large(x) + self.small(x)

    def deployed(self) -> nn.Module:
        """The single convolution that gives the same output in eval mode."""
        weight, bias = folded_weights(*self.large)
        small_weight, small_bias = folded_weights(*self.small)
        pad = (weight.shape[-1] - small_weight.shape[-1]) // 2
        conv = self.large[0]
        conv.weight.data = weight + F.pad(small_weight, [pad] * 4)
        conv.bias = nn.Parameter(bias + small_bias, requires_grad=False)
        return conv


class MEM(nn.Module):
    """Multi-scale embedding module: the channels split in two halves, one kernel size each.

    Each half: k x k conv, BN, ReLU, k x k conv, BN. Both concatenated, 1 x 1 conv, BN, residual, ReLU.
    reparam: none trains the second kernel as it is; parallel trains a small one beside it, and `deploy`
    merges both; construct trains the first size with a bias in its place, as the released code does.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, kernels: tuple[int, int], reparam: str
    ) -> None:
        super().__init__()
        first, second = kernels
        half_in, half = in_channels // 2, out_channels // 4
        self.split = (half_in, in_channels - half_in)
        self.small = nn.Sequential(
            conv_bn(half_in, half, first, stride=stride), nn.ReLU(inplace=True), conv_bn(half, half, first)
        )

        def large(channels: int, stride: int) -> nn.Module:
            if reparam == "parallel" and second > first:
                return LargeKernelConv(channels, half, large=second, small=first, stride=stride)
            kernel = first if reparam == "construct" else second
            return conv_bn(channels, half, kernel, stride=stride, bias=reparam == "construct")

        self.large = nn.Sequential(large(self.split[1], stride), nn.ReLU(inplace=True), large(half, 1))
        self.merge = conv_bn(2 * half, out_channels, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        a, b = x.split(self.split, dim=1)
        return F.relu(self.merge(torch.cat([self.small(a), self.large(b)], dim=1)) + self.shortcut(x))


class PlainBlock(nn.Module):
    """The block of reverse distillation's bottleneck, 1x1, 3x3, 1x1: UniNet without MEM (Table 4)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        inner = out_channels // 2
        first, second = conv_bn(in_channels, inner, 1), conv_bn(inner, inner, 3, stride=stride)
        third = conv_bn(inner, out_channels, 1)
        self.body = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv_bn(in_channels, out_channels, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Bring all levels to the coarsest size, concatenate, and compress (2 C_n w channels at half the size).

    Level i reaches level n by 3 x 3 convolutions (BN and ReLU after each), one per level in between, whose
    stride is 2, or 1 to a level of the same size.
    """

    def __init__(
        self, info: BackboneInfo, *, width: float = 1, kernels: Kernels = (3, 7), reparam: str = "none"
    ) -> None:
        super().__init__()
        channels, ratios = info.channels, [b // a for a, b in pairwise(info.strides)]
        wide = [round(c * width) for c in channels]
        self.fuse = nn.ModuleList()
        for level, c in enumerate(channels[:-1]):
            steps: list[nn.Module] = []
            for after, ratio in zip(wide[level + 1 :], ratios[level:], strict=True):
                steps += [conv_bn(c, after, 3, stride=ratio), nn.ReLU(inplace=True)]
                c = after
            self.fuse.append(nn.Sequential(*steps))
        fused, self.out_channels = wide[-1] * (len(channels) - 1) + channels[-1], 2 * wide[-1]

        def block(in_channels: int, stride: int) -> nn.Module:
            if kernels is None:
                return PlainBlock(in_channels, self.out_channels, stride=stride)
            return MEM(in_channels, self.out_channels, stride=stride, kernels=kernels, reparam=reparam)

        self.blocks = nn.Sequential(block(fused, 2), block(self.out_channels, 1), block(self.out_channels, 1))
        init_weights(self)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features fine to coarse to the embedding (B, 2 w C_n, H_n / 2, W_n / 2)."""
        fused = [fuse(f) for fuse, f in zip(self.fuse, features[:-1], strict=True)]
        return self.blocks(torch.cat([*fused, features[-1]], dim=1))

    def deploy(self) -> None:
        """Merge the parallel kernels, in place; batch norms are folded by the model afterwards."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LargeKernelConv):
                    setattr(module, name, child.deployed())
