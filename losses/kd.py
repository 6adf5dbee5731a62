"""Distillation loss L_KD: cosine distance between teacher and selected student features (Eqs. 1, 2, 7)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_distance(teacher: Tensor, student: Tensor, *, reading: str) -> Tensor:
    """Mean cosine distance of two (B, C, H, W) features, a scalar in [0, 2].

    reading: global flattens each image's feature into one vector of C H W (Eq. 1, as printed); pointwise
    takes the cosine along channels at each position and averages over positions (the released code). Stop the
    teacher's gradient (Eq. 2) outside, by `detach`.

    Raises:
        ValueError: for another reading.
    """
    if reading == "global":
        similarity = F.cosine_similarity(teacher.flatten(1), student.flatten(1), dim=1, eps=1e-12)
    elif reading == "pointwise":
        similarity = F.cosine_similarity(teacher, student, dim=1, eps=1e-12)
    else:
        raise ValueError(f"kd is '{reading}'; choose global or pointwise")
    return 1 - similarity.mean()
