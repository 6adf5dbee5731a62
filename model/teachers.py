"""The teachers: a frozen source (ImageNet) network and a trainable copy, the target (Sec. 3, 4.1)."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Features = list[Tensor]  # one (B, C_i, H_i, W_i) per level, fine to coarse


class FeatureStandardizer(nn.Module):
    """Bring each channel to the standard deviation `gain`, measured once on training normals.

    DFS (Eq. 4) takes the exponential of features, so their size decides how sharp its softmax is. Means stay:
    without them plain background is a random direction, and its cosine distance noise. gain None: no change.
    """

    def __init__(self, channels: tuple[int, ...], *, gain: float | None) -> None:
        super().__init__()
        self.gain = gain
        for level, c in enumerate(channels):
            self.register_buffer(f"factor{level}", torch.ones(1, c, 1, 1))

    def forward(self, features: Features) -> Features:
        """The scaled features; the identity until `fit` was called."""
        if self.gain is None:
            return features
        return [f * getattr(self, f"factor{level}") for level, f in enumerate(features)]

    @torch.no_grad()
    def fit(self, batches: Iterable[Features]) -> None:
        """Take the standard deviation per channel over all positions of all images of `batches`."""
        if self.gain is None:
            return
        total: list[Tensor] = []
        for features in batches:
            sums = [_moments(f.double()) for f in features]
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        assert total, "no batch to take feature statistics from"
        for level, (count, first, second) in enumerate(total):
            std = (second / count - (first / count) ** 2).clamp(min=0).sqrt()
            floor = 1e-3 * float(std.mean()) + 1e-12  # a dead channel stays small
            getattr(self, f"factor{level}").copy_((self.gain / std.clamp(min=floor)).view(1, -1, 1, 1))


def _moments(feature: Tensor) -> Tensor:
    """Count, sum and sum of squares per channel of a (B, C, H, W), as (3, C)."""
    total = feature.sum((0, 2, 3))
    count = torch.full_like(total, feature.numel() // len(total))
    return torch.stack([count, total, feature.square().sum((0, 2, 3))])


class Teachers(nn.Module):
    """Source teacher: frozen, always eval, no gradient. Target teacher: starts as its copy and is trained.

    train_bn: whether the target's batch norms take batch statistics in training.
    """

    def __init__(self, backbone: nn.Module, scale: FeatureStandardizer, *, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn
        self.source = backbone.eval().requires_grad_(False)
        self.target = copy.deepcopy(backbone).requires_grad_(True)
        self.scale = scale  # one for both: only so are their features comparable

    def forward(self, images: Tensor) -> tuple[Features, Features]:
        """Images (B, 3, H, W) to the source's and the target's features."""
        with torch.no_grad():
            source = self.scale(self.source(images))
        return source, self.scale(self.target(images))

    def train(self, mode: bool = True) -> "Teachers":
        """Switch the target's batch norms; the source stays in eval."""
        super().train(mode)
        self.source.eval()
        if not self.train_bn:
            self.target.eval()
        return self
