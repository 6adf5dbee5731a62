"""Supervised losses L_S of Eq. 13: cross-entropy, Dice, and polyps' structure loss; ReMIND's focal loss.

Legend: B images, H x W pixels. Logits are raw outputs; targets are 0 or 1, for labels also -1 (unknown).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config import LossConfig
from utils.distributed import global_count

BORDER_WINDOW, BORDER_WEIGHT = (
    31,
    5.0,
)  # of the structure loss: pixels near the mask's border count up to 1 + 5


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy over the elements whose target is known; zero if none is.

    Args:
        logits: any shape.
        target: the same shape, 0, 1 or -1.
    """
    known = target >= 0
    values = F.binary_cross_entropy_with_logits(
        logits, target.clamp(min=0).to(logits.dtype), reduction="none"
    )
    return (values * known).sum() / global_count(known)


def dice_loss(logits: Tensor, mask: Tensor, *, smooth: float = 1.0, images: Tensor | None = None) -> Tensor:
    """1 - (2 sum(p g) + s) / (sum(p) + sum(g) + s) per image, averaged over `images` or all.

    logits, mask: (B, 1, H, W). images: (B,) bool.
    """
    p, g = logits.sigmoid().flatten(1), mask.to(logits.dtype).flatten(1)
    loss = 1 - (2 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)
    return loss.mean() if images is None else (loss * images).sum() / global_count(images)


def focal_loss(logits: Tensor, mask: Tensor, *, gamma: float = 2.0, weight: float = 10.0) -> Tensor:
    """Focal cross-entropy, plus Dice of the images that have a defect; both (B, 1, H, W).

    weight x mean((1 - p_t)^gamma x cross-entropy), p_t the probability given to the truth (Lin et al., ICCV
    2017). The weight brings the first term, a mean
    over pixels that are nearly all normal and easy, to the size of the second.
    """
    mask = mask.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    focal = weight * ((1 - (-cross_entropy).exp()) ** gamma * cross_entropy).mean()
    return focal + dice_loss(logits, mask, images=mask.flatten(1).any(dim=1))


def structure_loss(logits: Tensor, mask: Tensor, *, bce: str = "mean") -> Tensor:
    """Cross-entropy plus weighted IoU; pixels near the border of the mask weigh more. Both (B, 1, H, W).

    Pixel weight w = 1 + 5 |mean of the mask over 31 x 31 - mask|. bce: "weighted" is the cross-entropy under
    w, as the loss was designed; "mean" is the plain mean, which the released code computes because the name
    of an argument is misspelt.

    Raises:
        ValueError: for another `bce`.
    """
    if bce not in ("mean", "weighted"):
        raise ValueError(f"bce is '{bce}'; choose mean or weighted")
    mask = mask.to(logits.dtype)
    local = F.avg_pool2d(mask, BORDER_WINDOW, stride=1, padding=BORDER_WINDOW // 2)
    weight = 1 + BORDER_WEIGHT * (local - mask).abs()
    if bce == "mean":
        cross_entropy = F.binary_cross_entropy_with_logits(logits, mask)
    else:
        values = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        cross_entropy = ((weight * values).sum((1, 2, 3)) / weight.sum((1, 2, 3))).mean()
    p = logits.sigmoid()
    both = (weight * p * mask).sum((1, 2, 3))
    either = (weight * (p + mask)).sum((1, 2, 3)) - both
    return cross_entropy + (1 - (both + 1) / (either + 1)).mean()


def supervised_loss(outputs: list[Tensor], target: Tensor, config: LossConfig) -> Tensor:
    """Sum of L_S over the heads' outputs, each with weight 1 (Eq. 13; public code: both halves).

    Args:
        outputs: label logits (B,), mask logits (B, 1, h, w), upsampled here (Phi), or frames (B, 3, H, W).
        target: label (B,), mask (B, 1, H, W) or frame (B, 3, H, W).
        config: which loss; `mse` is for frames.
    """
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "bce": bce_loss,
        "dice": dice_loss,
        "structure": partial(structure_loss, bce=config.structure_bce),
        "mse": F.mse_loss,
    }
    return torch.stack(
        [
            losses[config.supervised](x if x.dim() < 4 else upsample(x, target.shape[2:]), target)
            for x in outputs
        ]
    ).sum()


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Phi of Eq. 13: logits (B, C, h, w) at the mask's `size` (H, W)."""
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
