"""Anomaly map and score from 2n distance maps: the weighted decision mechanism (Sec. 4.5, Alg. 1).

Legend: B images, L = 2n maps, K = H W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

PERCENT = {"max": 0, "top1": 1, "top3": 3, "top5": 5, "top10": 10, "mean": 100}  # of the pixels (Table 5)


@dataclass
class Prediction:
    """What every model says of a batch. anomaly_map: (B, H, W), higher is more anomalous. score: (B,)."""

    anomaly_map: Tensor
    score: Tensor


def distance_map(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cosine along channels (Eq. 1 at each position): two (B, C, H, W) to (B, H, W) in [0, 2]."""
    return 1 - F.cosine_similarity(teacher.float(), student.float(), dim=1)


def decision_weight(maps: list[Tensor], *, values: str, alpha: float, beta: float) -> Tensor:
    """v_w of Eq. 14 for each image, the share of pixels that decides, (B,) float64: beta is not rounded.

    The maxima of the L maps pass a softmax; those above its mean form P. `values` says what is averaged over
    P: probability (as printed: alpha times it is at most alpha) or distance (the maxima themselves, released
    code). If all are equal, none is above the mean; then all count.
    """
    maxima = torch.stack([m.flatten(1).amax(dim=1) for m in maps], dim=1)  # (B, L)
    p = maxima.softmax(dim=1)
    kept = p > p.mean(dim=1, keepdim=True)
    kept = kept | ~kept.any(dim=1, keepdim=True)
    averaged = p if values == "probability" else maxima
    mean = (averaged * kept).sum(dim=1) / kept.sum(dim=1)
    return (alpha * mean).double().clamp(min=beta)


def top_mean(score_map: Tensor, share: Tensor, *, limit: float = 1.0) -> Tensor:
    """Mean of the largest share of the pixels of each map: (B, H, W) and (B,) in [0, limit] to (B,).

    The count is K * share without its fraction, at least one pixel. `limit` bounds the sorted prefix, so that
    no value has to be looked at (no sync, and a graph that can be exported).
    """
    flat = score_map.flatten(1)
    prefix = min(int(limit * flat.shape[1]) + 1, flat.shape[1])  # one more: the limit is rounded, too
    rounding = 2 * torch.finfo(torch.result_type(share, 1.0)).eps  # 0.29 is stored as less: 28 of 100
    count = (share.double() * (1 + rounding) * flat.shape[1]).long().clamp(1, prefix)
    largest = flat.topk(prefix, dim=1).values.double().cumsum(dim=1)
    return (largest.gather(1, count[:, None] - 1)[:, 0] / count).to(score_map.dtype)


def added(maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Sum (B, H, W) of maps (B, h_i, w_i), each enlarged to `size`."""
    resize = partial(F.interpolate, size=tuple(size), mode="bilinear", align_corners=True)
    return reduce(torch.add, [resize(m[:, None]) for m in maps])[:, 0]


def gaussian_blur(maps: Tensor, sigma: float, size: int | None = None) -> Tensor:
    """Separable Gaussian with mirrored borders, as scipy.ndimage.gaussian_filter (truncate 4). (B, H, W).

    With `size`, an odd number of pixels, its kernel has that side and the map continues as zero.
    """
    if sigma == 0:
        return maps
    radius = int(4 * sigma + 0.5) if size is None else size // 2
    x = torch.arange(-radius, radius + 1, dtype=torch.float64, device=maps.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(maps.dtype)
    out = maps[:, None]
    if size is not None:
        out = F.conv2d(out, kernel.view(1, 1, -1, 1), padding=(radius, 0))
        return F.conv2d(out, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0]
    out = F.conv2d(out[:, :, _mirrored(out.shape[2], radius, maps.device)], kernel.view(1, 1, -1, 1))
    out = F.conv2d(out[:, :, :, _mirrored(out.shape[3], radius, maps.device)], kernel.view(1, 1, 1, -1))
    return out[:, 0]


def _mirrored(size: int, radius: int, device: torch.device) -> Tensor:
    """Indices that extend 0..size-1 by `radius` on both sides, the border repeated (d c b a | a b c d)."""
    index = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


@dataclass(frozen=True)
class Decision:
    """The scoring path that every model and command shares; fields as in the config section `score`."""

    decision: str
    alpha: float
    beta: float
    score_sigma: float
    map_sigma: float
    head_weight: float = 0.0
    blur_size: int | None = None
    score_map: str = "raw"  # legacy_exp: of the public code before May 2025 (evaluation.published_protocol)

    def __call__(
        self,
        maps: list[Tensor],
        size: Sequence[int],
        *,
        highest: float = math.inf,
        head_score: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Prediction:
        """Sum of the upsampled maps, M_AS, and the score of each image, which depends on that image alone.

        maps: distances (B, h_i, w_i). size: (H, W) of M_AS. highest: what no distance exceeds.
        head_score: (B,), a head's own score, added with `head_weight`. factor: (B, H, W), multiplies M_AS.
        """
        # a blur in bf16 would round scores to three digits
        with torch.autocast(maps[0].device.type, enabled=False):
            maps = [m.float() for m in maps]
            total = added(maps, size)
            total = total if factor is None else total * factor
            share, limit = self._share(maps, highest)
            scored = total
            if self.score_map == "legacy_exp":  # the top values are the low distances
                scored = 1 - torch.exp(total - total.amax(dim=(1, 2), keepdim=True))
            score = top_mean(gaussian_blur(scored, self.score_sigma, self.blur_size), share, limit=limit)
            anomaly_map = gaussian_blur(total, self.map_sigma, self.blur_size)
        if head_score is not None:
            score = score + self.head_weight * head_score.float()
        return Prediction(anomaly_map, score)

    def _share(self, maps: list[Tensor], highest: float) -> tuple[Tensor, float]:
        """The share of the pixels that decides for each image, (B,) float64, and what it cannot exceed."""
        if self.decision in PERCENT:
            limit = PERCENT[self.decision] / 100
            return maps[0].new_full(maps[0].shape[:1], limit, dtype=torch.float64), limit
        values = "probability" if self.decision == "weighted" else "distance"
        share = decision_weight(maps, values=values, alpha=self.alpha, beta=self.beta)
        averaged = 1.0 if values == "probability" else highest
        return share, min(max(self.alpha * averaged, self.beta), 1.0) if self.alpha else self.beta
