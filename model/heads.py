"""Small heads: a label, mask or video frame from the student's features (Eq. 13, Sec. 8.2); ReMIND's head.

Legend: B images, C channels of the level that a head sits on.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.supervised import upsample
from model.layers import conv_bn


class LabelHead(nn.Module):
    """Anomaly logit of an image: one logit per position, averaged (Phi of Eq. 13; public code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B,)."""
        return self.linear(feature.flatten(2).transpose(1, 2))[..., 0].mean(dim=1)


class MaskHead(nn.Module):
    """Anomaly logit of every position: a 1 x 1 convolution without bias (Phi upsamples it to the mask)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 1, h, w)."""
        return self.conv(feature)


class FrameHead(nn.Module):
    """A frame from the student's finest feature: one convolution per doubling of the size, then one to RGB.

    The paper gives no architecture and the public code has none; this is ours, kept small.
    """

    def __init__(self, channels: int, stride: int, *, width: int = 32) -> None:
        super().__init__()
        doublings = stride.bit_length() - 1
        self.steps = nn.ModuleList(conv_bn(channels if i == 0 else width, width, 3) for i in range(doublings))
        self.to_rgb = nn.Conv2d(width if doublings else channels, 3, 3, padding=1)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 3, stride h, stride w), in the normalisation of the input."""
        for step in self.steps:
            feature = F.relu(step(feature))
            feature = upsample(feature, [2 * side for side in feature.shape[2:]])
        return self.to_rgb(feature)


class DiscriminationHead(nn.Module):
    """ReMIND: anomaly logit of every position from how teacher and student differ, channel by channel.

    Its input is the summands of the cosine on each level: products of both features, each of length 1 along
    channels, times C. A distance map keeps their sum alone; which of them are small tells more (as in
    DeSTSeg, Zhang et al., CVPR 2023). Each level is mixed to `width` channels at the finest size, and added.
    """

    def __init__(self, channels: Sequence[int], *, width: int = 64) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(
            nn.ReLU(), conv_bn(width, width, 3), nn.ReLU(), conv_bn(width, width, 3), nn.ReLU()
        )
        self.out = nn.Conv2d(width, 1, 1)
        self.out.bias = nn.Parameter(torch.tensor([-3.0]))  # a start at 5 %: anomalies are rare

    def forward(self, teachers: Sequence[Tensor], students: Sequence[Tensor]) -> Tensor:
        """Features (B, C_i, H_i, W_i), fine to coarse, of both to (B, 1, H_1, W_1), in float32."""
        size, levels = teachers[0].shape[2:], []
        with torch.autocast(teachers[0].device.type, enabled=False):  # small differences of large numbers
            for mix, teacher, student in zip(self.mix, teachers, students, strict=True):
                t, s = F.normalize(teacher.float(), dim=1), F.normalize(student.float(), dim=1)
                mixed = mix(t * s * teacher.shape[1])
                levels.append(upsample(mixed, size))
            return self.out(self.body(self.norm(reduce(torch.add, levels))))
