"""Small heads on the student's features: a label, a mask, or a video frame (Eq. 13 and Sec. 8.2).

Legend: B images, C channels of the level a head sits on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import conv_bn


class LabelHead(nn.Module):
    """Anomaly logit of an image: a logit of each position, and the mean of the largest (Phi of Eq. 13).

    share: of the positions that are averaged, at least one. With 1 it is the public code's linear layer on
    the spatial mean; a small share lets a defect of few positions decide (multiple-instance learning).
    """

    def __init__(self, channels: int, *, share: float = 1.0) -> None:
        super().__init__()
        self.linear, self.share = nn.Linear(channels, 1), share

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B,)."""
        logits = self.linear(feature.flatten(2).transpose(1, 2))[..., 0]  # (B, h w)
        if self.share == 1:
            return logits.mean(dim=1)
        count = max(1, round(self.share * logits.shape[1]))
        return logits.topk(count, dim=1).values.mean(dim=1)


class MaskHead(nn.Module):
    """Anomaly logit of every position: a 1 x 1 convolution without bias (Phi upsamples it to the mask)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B, 1, h, w)."""
        return self.conv(feature)


class FrameHead(nn.Module):
    """A frame from the student's finest feature: a convolution a doubling of the size, then one to RGB.

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
            feature = F.interpolate(F.relu(step(feature)), scale_factor=2.0, mode="bilinear")
        return self.to_rgb(feature)
