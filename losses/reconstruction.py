"""UniAS's loss: squared error and cosine distance of restored features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(targets: list[Tensor], restored: list[Tensor], *, weight: float) -> dict[str, Tensor]:
    """Sum over stages of both terms, times `weight`; each stage (B, C_l, h_l, w_l).

    The public code minimises the mean cosine itself, which pushes the wrong way; here it is 1 - cosine.
    """
    pairs = [(t.float(), r.float()) for t, r in zip(targets, restored, strict=True)]
    mse = torch.stack([F.mse_loss(r, t) for t, r in pairs]).sum()
    cosine = torch.stack([1 - F.cosine_similarity(r, t, dim=1).mean() for t, r in pairs]).sum()
    return {"mse": mse, "cosine": cosine, "total": weight * (mse + cosine)}
