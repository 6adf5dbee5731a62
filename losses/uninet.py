"""The overall unsupervised loss L_U = lambda L_KD + (1 - lambda) L_SC + L_M (Eq. 12) over all pairs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from losses.eager_backward import eager_backward
from losses.kd import cosine_distance
from losses.similarity import Diagonal, contrastive_loss, margin_loss, normal_positions, softmax_diagonal
from utils.config import LossConfig

MARGIN = 1.0  # tau of Eq. 11


@dataclass
class Pair:
    """A teacher feature and the student feature that restores it, both (B, C, H, W).

    select: student and teacher to the selected student feature (F_S)^P (Eq. 6); None: F_S itself.
    weights: the parameters that `select` uses.
    """

    teacher: Tensor
    student: Tensor
    select: Callable[[Tensor, Tensor], Tensor] | None = None
    weights: tuple[Tensor, ...] = ()


def uninet_loss(
    pairs: list[Pair],
    config: LossConfig,
    *,
    label: Tensor | None = None,
    mask: Tensor | None = None,
    diagonals: list[Diagonal] | None = None,
) -> dict[str, Tensor]:
    """Sum over 2n pairs (the source teacher's n first) of the weighted terms kd, sc, m; these unweighted.

    Each is a mean over batch and positions; `reduction: paper` divides L_SC and L_M by n (Eqs. 10, 11).
    Computed in float32 whatever the model's precision, as a softmax over thousands of positions needs it.
    label: (B,), 1 for an anomalous image. mask: (B, 1, H, W) of anomalous pixels; it wins over the label.
    Both None: all is normal. diagonals: takes the similarity diagonal of each pair, for curves.
    """
    divisor = len(pairs) // 2 if config.reduction == "paper" else 1
    names = ("kd", "sc", "m", "total")
    parts = dict.fromkeys(names, torch.zeros((), device=pairs[0].teacher.device))

    def weighted(pair: Pair, teacher: Tensor, student: Tensor, *_: Tensor) -> Tensor:
        teacher, student = teacher.float(), student.float()
        student = student if pair.select is None else pair.select(student, teacher)
        normal = normal_positions(teacher.shape[2:], label=label, mask=mask)
        taught = teacher if config.stop_grad == "none" else teacher.detach()  # Eq. 2
        kd = cosine_distance(taught, student, reading=config.kd)
        sc = m = kd.new_zeros(())
        if config.terms:
            taught = teacher.detach() if config.stop_grad == "all" else teacher
            d = softmax_diagonal(student, taught, config.temperature)  # Eq. 9
            sc = contrastive_loss(d, normal) / divisor if "contrastive" in config.terms else sc
            m = margin_loss(d, MARGIN, normal) / divisor if "margin" in config.terms else m
            if diagonals is not None:
                diagonals.append((d.detach(), normal))
        for name, value in zip(names, (kd, sc, m), strict=False):
            parts[name] = parts[name] + value.detach()
        return config.kd_weight * kd + (1 - config.kd_weight) * sc + m

    for pair in pairs:  # backward at once: one graph at a time is in memory
        value = eager_backward(partial(weighted, pair), pair.teacher, pair.student, *pair.weights)
        parts["total"] = parts["total"] + value
    return parts
