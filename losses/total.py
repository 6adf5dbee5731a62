"""The overall unsupervised loss L_U = lambda L_KD + (1 - lambda) L_SC + L_M (Eq. 12) over all pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.kd import cosine_distance
from losses.similarity import Diagonal, contrastive_loss, margin_loss, matched_similarity, normal_positions
from utils.config import LossConfig


@dataclass
class Pair:
    """A teacher feature and the selected student feature (F_S)^P that restores it, both (B, C, H, W)."""

    teacher: Tensor
    student: Tensor


def uninet_loss(
    pairs: list[Pair],
    config: LossConfig,
    *,
    label: Tensor | None = None,
    mask: Tensor | None = None,
    progress: float = 1.0,
    seen: list[Diagonal] | None = None,
) -> dict[str, Tensor]:
    """Sum over pairs of the weighted terms; each term is a mean over batch and positions.

    `reduction: paper` divides L_SC and L_M by the number n of levels (Eqs. 10, 11), where both teachers give
    2n pairs; `released` sums over pairs. `kd_anomalous: false` keeps anomalous positions out of L_KD, so
    that the student does not learn to restore them. `kd_hardest` below 1 averages L_KD over the hardest
    positions alone, all of them at `progress` 0 and that share from `kd_hardest_from` on. Computed in float32
    whatever the model's precision.

    seen: takes the similarity diagonal of each pair, for curves.

    Returns:
        kd, sc, m (before weighting) and total.
    """
    levels = len(pairs) // 2 if config.pairs == "both" else len(pairs)
    hardest = 1 - (1 - config.kd_hardest) * min(1.0, progress / config.kd_hardest_from)
    kd, sc, m = (pairs[0].teacher.new_zeros((), dtype=torch.float32) for _ in range(3))
    for pair in pairs:
        teacher, student = pair.teacher.float(), pair.student.float()
        normal = normal_positions(teacher.shape[2:], label=label, mask=mask)
        taught, restored = _stop(teacher, config.stop_grad_kd), None if config.kd_anomalous else normal
        kd = kd + cosine_distance(taught, student, reading=config.kd, normal=restored, hardest=hardest)
        if not (config.contrastive or config.margin):
            continue
        d = matched_similarity(student, _stop(teacher, config.stop_grad_similarity), config.temperature)
        if seen is not None:
            seen.append((d.detach(), normal))
        if config.contrastive:
            sc = sc + contrastive_loss(d, normal)
        if config.margin:
            m = m + margin_loss(d, config.tau, normal)
    if config.reduction == "paper":
        sc, m = sc / levels, m / levels
    total = config.kd_weight * kd + (1 - config.kd_weight) * sc + m
    return {"kd": kd, "sc": sc, "m": m, "total": total}


def _stop(x: Tensor, stop: bool) -> Tensor:
    return x.detach() if stop else x
