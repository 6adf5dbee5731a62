"""ReContrast's loss: global cosine distance whose gradient leaves easy positions out (NeurIPS 2023).

Legend: B images, C channels, H x W positions.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from losses.kd import cosine_distance

ALPHA_START, ALPHA_END = -3.0, 1.0  # standard deviations above the mean distance


def mining_alpha(progress: float, *, warm: float = 0.1) -> float:
    """Where the threshold of hard positions lies, by the share of training that is done.

    From -3 (nearly all positions count) to 1 standard deviation above the mean over the first `warm`.
    """
    return min(ALPHA_START + (ALPHA_END - ALPHA_START) * progress / warm, ALPHA_END)


def easy_positions(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """Where the cosine distance is below mean + alpha x deviation over batch and positions, (B, 1, H, W)."""
    with torch.no_grad():
        distance = 1 - F.cosine_similarity(teacher, student, dim=1)
        mean, deviation = moments(distance)
        return (distance < mean + alpha * deviation)[:, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation over all values, those of other processes' batches included."""
    if not (dist.is_available() and dist.is_initialized()):
        return x.mean(), x.std()
    count = x.numel() * dist.get_world_size()
    mean = x.sum()
    dist.all_reduce(mean)
    mean = mean / count
    square = (x - mean).square().sum()
    dist.all_reduce(square)
    return mean, (square / (count - 1)).sqrt()


def mined_distance(teacher: Tensor, student: Tensor, alpha: float) -> Tensor:
    """Mean distance of flattened features (B, C, H, W); easy positions of the student get no gradient.

    The value is that of `cosine_distance` with reading "global". The teacher gets no gradient at all.
    """
    easy = easy_positions(teacher, student, alpha)
    hard_only = torch.where(easy, student.detach(), student)
    return cosine_distance(teacher.detach(), hard_only, reading="global")
