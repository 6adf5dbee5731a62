"""Distillation loss L_KD: cosine distance between teacher and selected student features (Eqs. 1, 2, 7)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_concat, global_count, rank, world_size


def cosine_distance(
    teacher: Tensor, student: Tensor, *, reading: str, normal: Tensor | None = None, hardest: float = 1.0
) -> Tensor:
    """Mean cosine distance of two (B, C, H, W) features, a scalar in [0, 2].

    reading: global flattens each image's feature into one vector of C H W (Eq. 1, as printed); pointwise
    takes the cosine along channels at each position and averages over positions (the released code). Stop the
    teacher's gradient (Eq. 2) outside, by `detach`.

    normal: (B, H W) bool; other positions are left out, and with `global` an image that has none but them.
    None: all count. Zero if nothing is normal.

    hardest: with pointwise, the share of the counted positions of the batch that is averaged, those of the
    largest distance (at least one).

    Raises:
        ValueError: for another reading.
    """
    if reading not in ("global", "pointwise"):
        raise ValueError(f"kd is '{reading}'; choose global or pointwise")
    teacher, student = teacher.flatten(2), student.flatten(2)
    counted = normal
    if reading == "global":
        if normal is not None:
            teacher, student = teacher * normal[:, None], student * normal[:, None]
            counted = normal.any(dim=1)
        teacher, student = teacher.flatten(1), student.flatten(1)
    distance = 1 - F.cosine_similarity(teacher, student, dim=1, eps=1e-12)
    if hardest < 1 and reading == "pointwise":
        return _hardest_mean(distance.flatten(), counted, hardest)
    if counted is None:
        return distance.mean()
    return (distance * counted).sum() / global_count(counted)


def _hardest_mean(distance: Tensor, counted: Tensor | None, share: float) -> Tensor:
    """Mean of the largest share of the counted distances (B N,), at least one; zero if none is counted.

    Of several processes each gives the part of its own images, times their number (utils/distributed.py).
    """
    candidates = distance.detach()
    if counted is not None:
        candidates = candidates.masked_fill(~counted.flatten(), -math.inf)
    everywhere = all_concat(candidates)
    count = math.ceil(share * int((everywhere != -math.inf).sum()))
    if count == 0:
        return distance.sum() * 0
    index = everywhere.topk(count).indices - rank() * len(distance)
    local = index[(index >= 0) & (index < len(distance))]
    return distance[local].sum() * world_size() / count
