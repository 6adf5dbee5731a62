"""Distillation loss L_KD: cosine distance between teacher and selected student features (Eqs. 1, 2, 7)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_concat, rank, world_size


def cosine_distance(teacher: Tensor, student: Tensor, *, reading: str) -> Tensor:
    """Mean cosine distance of two (B, C, H, W) features, a scalar in [0, 2].

    reading: global flattens each image's feature into one vector (Eq. 1, as printed); pointwise takes the
    cosine along channels at each position and averages over positions (the released code). Anything else is a
    ValueError. Stop the teacher's gradient (Eq. 2) outside, by `detach`.
    """
    if reading not in ("global", "pointwise"):
        raise ValueError(f"kd is '{reading}'; choose global or pointwise")
    start = 1 if reading == "global" else 2
    return _distance(teacher.flatten(start), student.flatten(start)).mean()


def hardest_distance(teacher: Tensor, student: Tensor, normal: Tensor, share: float | Tensor) -> Tensor:
    """Cosine distance averaged over the hardest `share` of a batch's normal positions (ReMIND), a scalar.

    teacher, student: (B, C, H, W). normal: (B, H W) bool. share: in (0, 1], a scalar; one position at least,
    zero if none is normal. Of several processes each gives the part of its own images, times their number.
    How many positions count is known to the device alone, so all are sorted: no sync point.
    """
    distance = _distance(teacher.flatten(2), student.flatten(2)).flatten()
    everywhere = all_concat(distance.detach().masked_fill(~normal.flatten(), -math.inf))
    count = (share * (everywhere != -math.inf).sum().double()).ceil()
    place = everywhere.argsort(descending=True).argsort()[rank() * len(distance) :][: len(distance)]
    total = torch.where(place < count, distance, 0).sum() * world_size()
    return total / count.clamp(min=1).to(total)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(a, b, dim=1, eps=1e-12)
