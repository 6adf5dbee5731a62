"""Supervised losses L_S of Eq. 13: cross-entropy, Dice, polyps' structure loss; and ReMIND's focal loss.

Legend: B images, H x W pixels. Logits are raw outputs; targets are 0 or 1, for labels also -1 (unknown).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import global_count

BORDER_WINDOW, BORDER_WEIGHT = 31, 5.0  # structure loss: pixels near the mask's border weigh up to 1 + 5
FOCAL_GAMMA, FOCAL_WEIGHT = 2.0, 10.0  # the weight brings a mean over easy, normal pixels to the size of Dice


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy averaged over the elements whose target is known; zero if none is.

    Both of any one shape; target 0, 1 or -1.
    """
    known, truth = target >= 0, target.clamp(min=0).to(logits.dtype)
    values = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (values * known).sum() / global_count(known)


def dice_loss(logits: Tensor, mask: Tensor, *, smooth: float = 1.0, images: Tensor | None = None) -> Tensor:
    """1 - (2 sum(p g) + s) / (sum(p) + sum(g) + s) per image, averaged over `images` or all.

    logits, mask: (B, 1, H, W). images: (B,) bool.
    """
    p, g = logits.sigmoid().flatten(1), mask.to(logits.dtype).flatten(1)
    loss = 1 - (2 * (p * g).sum(1) + smooth) / (p.sum(1) + g.sum(1) + smooth)
    return loss.mean() if images is None else (loss * images).sum() / global_count(images)


def focal_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Focal cross-entropy, plus Dice of the images that have a defect; both (B, 1, H, W).

    The first is weight x mean((1 - p_t)^gamma x cross-entropy), p_t of the truth (Lin et al., ICCV 2017).
    """
    mask = mask.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    focal = FOCAL_WEIGHT * ((1 - (-cross_entropy).exp()) ** FOCAL_GAMMA * cross_entropy).mean()
    return focal + dice_loss(logits, mask, images=mask.flatten(1).any(dim=1))


def structure_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy plus weighted IoU; pixels near the border of the mask weigh more. Both (B, 1, H, W).

    Pixel weight w = 1 + 5 |mean of the mask over 31 x 31 - mask|. The cross-entropy is a plain mean, as the
    released code computes it: the name of an argument is misspelt there, and so its weights cancel.
    """
    mask = mask.to(logits.dtype)
    local = F.avg_pool2d(mask, BORDER_WINDOW, stride=1, padding=BORDER_WINDOW // 2)
    weight = 1 + BORDER_WEIGHT * (local - mask).abs()
    p = logits.sigmoid()
    both = (weight * p * mask).sum((1, 2, 3))
    either = (weight * (p + mask)).sum((1, 2, 3)) - both
    return F.binary_cross_entropy_with_logits(logits, mask) + (1 - (both + 1) / (either + 1)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # loss.supervised; mse is for frames
    "bce": bce_loss,
    "dice": dice_loss,
    "structure": structure_loss,
    "mse": F.mse_loss,
}


def supervised_loss(outputs: Sequence[Tensor], target: Tensor, name: str) -> Tensor:
    """Sum of the loss of that name over the heads' outputs, each with weight 1 (Eq. 13).

    outputs: label logits (B,), mask logits (B, 1, h, w), upsampled here, or frames (B, 3, H, W).
    target: label (B,), mask (B, 1, H, W) or frame (B, 3, H, W).
    """
    sized = [x if x.dim() < 4 else upsample(x, target.shape[2:]) for x in outputs]
    return torch.stack([LOSSES[name](x, target) for x in sized]).sum()


def upsample(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Phi of Eq. 13: (B, C, h, w) at `size` (H, W), bilinear."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.requires_grad and x.device.type != "cpu":
        return _upsample_by_products(x, size, align_corners=align_corners)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def _upsample_by_products(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """The same up to rounding. The gradient of torch's own sums in any order on a GPU, or where it must not,
    waits for the device, so that no CUDA graph can hold it.
    """
    rows, columns = (
        F.interpolate(
            torch.eye(before, dtype=x.dtype, device=x.device)[None],
            size=after,
            mode="linear",
            align_corners=align_corners,
        )[0]
        for before, after in zip(x.shape[2:], size, strict=True)
    )
    return rows.T @ (x @ columns)
