"""The overall unsupervised loss L_U = lambda L_KD + (1 - lambda) L_SC + L_M (Eq. 12) over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from losses.eager_backward import eager_backward
from losses.kd import cosine_distance
from losses.similarity import Diagonal, contrastive_loss, margin_loss, normal_positions, softmax_diagonal
from utils.config import LossConfig


@dataclass
class Pair:
    """A teacher feature and the student feature that restores it, both (B, C, H, W).

    select: student and teacher to the selected student feature (F_S)^P; None: F_S itself.
    learnt: the parameters that `select` uses.
    """

    teacher: Tensor
    student: Tensor
    select: Callable[[Tensor, Tensor], Tensor] | None = None
    learnt: tuple[Tensor, ...] = ()


def uninet_loss(
    pairs: list[Pair],
    config: LossConfig,
    *,
    label: Tensor | None = None,
    mask: Tensor | None = None,
    seen: list[Diagonal] | None = None,
) -> dict[str, Tensor]:
    """Sum over pairs of the weighted terms; each term is a mean over batch and positions.

    `reduction: paper` divides L_SC and L_M by the number n of levels (Eqs. 10, 11); the 2n pairs of both
    teachers are summed either way. Computed in float32 whatever the model's precision. The gradients of a
    pair are formed with its terms, before the next pair's.

    seen: takes the similarity diagonal of each pair, for curves.

    Returns:
        kd, sc, m (before weighting) and total, the one that has a gradient.
    """
    divisor = len(pairs) // 2 if config.reduction == "paper" else 1
    parts = dict.fromkeys(("kd", "sc", "m", "total"), torch.zeros((), device=pairs[0].teacher.device))

    def of_pair(pair: Pair, teacher: Tensor, student: Tensor, *_: Tensor) -> Tensor:
        teacher, student = teacher.float(), student.float()
        selected = student if pair.select is None else pair.select(student, teacher)
        kd, sc, m = _terms(teacher, selected, config, label=label, mask=mask, seen=seen)
        sc, m = sc / divisor, m / divisor
        for name, value in {"kd": kd, "sc": sc, "m": m}.items():
            parts[name] = parts[name] + value.detach()
        return config.kd_weight * kd + (1 - config.kd_weight) * sc + m

    for pair in pairs:
        value = eager_backward(partial(of_pair, pair), pair.teacher, pair.student, *pair.learnt)
        parts["total"] = parts["total"] + value
    return parts


def _terms(
    teacher: Tensor,
    student: Tensor,
    config: LossConfig,
    *,
    label: Tensor | None,
    mask: Tensor | None,
    seen: list[Diagonal] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_KD, L_SC and L_M of one pair; those that are switched off are zero."""
    normal = normal_positions(teacher.shape[2:], label=label, mask=mask)
    kd = cosine_distance(_stop(teacher, config.stop_grad_kd), student, reading=config.kd)
    sc = m = kd.new_zeros(())
    if config.contrastive or config.margin:
        d = softmax_diagonal(student, _stop(teacher, config.stop_grad_similarity), config.temperature)
        if seen is not None:
            seen.append((d.detach(), normal))
        sc = contrastive_loss(d, normal) if config.contrastive else sc
        m = margin_loss(d, config.tau, normal) if config.margin else m
    return kd, sc, m


def _stop(x: Tensor, stop: bool) -> Tensor:
    return x.detach() if stop else x
