"""The teachers: a frozen source (ImageNet) network and a trainable copy, the target (Sec. 3, 4.1)."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

Features = list[Tensor]  # one (B, C_i, H_i, W_i) a level, fine to coarse


class FeatureScale(nn.Module):
    """Scale features per channel by statistics of the training normals, before anything else sees them.

    none: as they come. std: divided by the standard deviation. standardise: the mean removed as well, so that
    features have both signs. `gain` is the standard deviation they have afterwards: DFS (Eq. 4) takes the
    exponential of features, so their size decides how sharp its softmax is.
    """

    def __init__(self, channels: tuple[int, ...], *, mode: str, gain: float) -> None:
        super().__init__()
        self.mode, self.gain = mode, gain
        for level, c in enumerate(channels):
            self.register_buffer(f"mean{level}", torch.zeros(1, c, 1, 1))
            self.register_buffer(f"factor{level}", torch.ones(1, c, 1, 1))

    def forward(self, features: Features) -> Features:
        """Return the scaled features; the identity until `fit` was called, and for mode none."""
        if self.mode == "none":
            return features
        return [(f - getattr(self, f"mean{i}")) * getattr(self, f"factor{i}") for i, f in enumerate(features)]

    @torch.no_grad()
    def fit(self, batches: Iterable[Features]) -> None:
        """Take mean and standard deviation per channel over all positions of all images of `batches`."""
        if self.mode == "none":
            return
        count, total, square = 0, None, None
        for features in batches:
            sums = [f.double().sum((0, 2, 3)) for f in features]
            squares = [f.double().square().sum((0, 2, 3)) for f in features]
            total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
            square = squares if square is None else [a + b for a, b in zip(square, squares, strict=True)]
            count += features[0].shape[0]
            sizes = [f.shape[2] * f.shape[3] for f in features]
        assert total is not None and square is not None, "no batch to take feature statistics from"
        for level, (s, q, size) in enumerate(zip(total, square, sizes, strict=True)):
            mean = s / (count * size)
            std = (q / (count * size) - mean**2).clamp(min=0).sqrt()
            factor = self.gain / std.clamp(min=1e-3 * float(std.mean()) + 1e-12)  # a dead channel stays small
            if self.mode == "standardise":
                getattr(self, f"mean{level}").copy_(mean.view(1, -1, 1, 1))
            getattr(self, f"factor{level}").copy_(factor.view(1, -1, 1, 1))


class Teachers(nn.Module):
    """Source teacher: frozen, always eval, no gradient. Target teacher: starts as its copy and is trained.

    train_bn: whether the target's batch norms take batch statistics in training.
    """

    def __init__(self, backbone: nn.Module, scale: FeatureScale, *, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn
        self.source = backbone.eval().requires_grad_(False)
        self.target = copy.deepcopy(backbone).requires_grad_(True)
        self.scale = scale

    def forward(self, images: Tensor) -> tuple[Features, Features]:
        """Images (B, 3, H, W) to the source's and the target's features."""
        with torch.no_grad():
            source = self.scale(self.source(images))
        return source, self.scale(self.target(images))

    def train(self, mode: bool = True) -> Teachers:
        """Switch the target's batch norm; the source stays in eval."""
        super().train(mode)
        self.source.eval()
        if not self.train_bn:
            self.target.eval()
        return self
