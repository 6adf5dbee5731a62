"""Similarity-contrastive loss L_SC and margin loss L_M (Sec. 4.4, Eqs. 8 to 11).

Both need only the diagonal of the softmax over teacher positions, d_j = exp(m_jj) / sum_k exp(m_jk), with
m = s t^T / T for L2-normalised features. `similarity_rows` gives m_jj and log sum_k exp(m_jk) row block by
row block, so the N x N matrix is never in memory, forward or backward.

Legend: B images, N = H W positions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

EPS = 1e-8  # epsilon of Eqs. 9 and 10
BLOCK_ELEMENTS = 1 << 20  # 4 MB of float32 a block: stays in cache
SAFE_TEMPERATURE = 0.05  # cosines / T stay within +-20 above it: exp(m - 1/T) cannot underflow as a whole


class _SimilarityRows(torch.autograd.Function):
    """Diagonal and row log-sum-exp of s t^T / T, and their gradients, by blocks of rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, student: Tensor, teacher: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        diagonal = (student * teacher).sum(dim=2) / temperature  # (B, N)
        lse = torch.empty_like(diagonal)
        # softmax rows times teacher: all that the student's gradient needs
        expected = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for b, rows in _blocks(student):
            m, shift = _shifted_block(student[b, rows], teacher[b], temperature)
            e = m.exp_()
            total = e.sum(dim=1)
            lse[b, rows] = total.log() + shift
            if expected is not None:
                torch.mm(e, teacher[b], out=expected[b, rows]).div_(total[:, None])
        ctx.save_for_backward(student, teacher, lse, *([] if expected is None else [expected]))
        ctx.temperature = temperature
        return diagonal, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, g_diagonal: Tensor, g_lse: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        student, teacher, lse, *expected = ctx.saved_tensors
        g_student = g_teacher = None
        if expected:
            g_student = (g_diagonal[..., None] * teacher + g_lse[..., None] * expected[0]) / ctx.temperature
        if ctx.needs_input_grad[1]:
            g_teacher = g_diagonal[..., None] * student
            weighted = g_lse[..., None] * student
            for b, rows in _blocks(student):  # columns need all rows' gradients first: form each block again
                m, shift = _shifted_block(student[b, rows], teacher[b], ctx.temperature)
                p = m.add_((shift - lse[b, rows])[:, None]).exp_()
                g_teacher[b].addmm_(p.T, weighted[b, rows])
            g_teacher = g_teacher / ctx.temperature
        return g_student, g_teacher, None


def _blocks(x: Tensor) -> list[tuple[int, slice]]:
    rows = max(1, BLOCK_ELEMENTS // x.shape[1])
    return [(b, slice(i, i + rows)) for b in range(x.shape[0]) for i in range(0, x.shape[1], rows)]


def _shifted_block(rows: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(R, C), (N, C) to (R, N) logits minus a shift that keeps their exponential in range; the shift (R,)."""
    if temperature >= SAFE_TEMPERATURE:  # no pass for the row maximum: cosines are bounded by 1
        shift = rows.new_full((len(rows),), 1 / temperature)
        return torch.addmm(shift[:, None], rows, teacher.T, beta=-1, alpha=1 / temperature), shift
    m = torch.mm(rows, teacher.T).div_(temperature)
    shift = m.amax(dim=1)
    return m.sub_(shift[:, None]), shift


def similarity_rows(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Diagonal m_jj and row log-sum-exp of the similarity matrix m (Eq. 8), each (B, N), exact.

    Args:
        student: (B, N, C), L2-normalised along C, rows of m.
        teacher: (B, N, C), L2-normalised along C, columns of m; receives a gradient if it requires one.
        temperature: T > 0.

    Raises:
        ValueError: if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape"
        )
    return _SimilarityRows.apply(student.contiguous(), teacher.contiguous(), temperature)


def matched_similarity(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The diagonal d of the normalised similarity matrix (Eq. 9), (B, N) in (0, 1], of two (B, C, H, W)."""
    s = F.normalize(student.flatten(2).transpose(1, 2).float(), dim=2)
    t = F.normalize(teacher.flatten(2).transpose(1, 2).float(), dim=2)
    diagonal, lse = similarity_rows(s, t, temperature)
    return torch.exp(diagonal - lse)


def contrastive_loss(d: Tensor, normal: Tensor | None = None) -> Tensor:
    """L_SC of one pair (Eq. 10): mean of -log(d + eps) over normal positions; zero if there are none.

    Args:
        d: (B, N) from `matched_similarity`.
        normal: (B, N) bool, True where the training image is normal; None if all are.
    """
    value = -torch.log(d + EPS)
    return value.mean() if normal is None else _masked_mean(value, normal)


def margin_loss(d: Tensor, tau: float, normal: Tensor | None = None) -> Tensor:
    """L_M of one pair (Eq. 11): mean of max(0, tau - d) over normal, of max(0, d - tau / 2) over others.

    With T = 2 d stays below 0.011 at 256 px, so for tau = 1 the hinge never closes and the loss is 1 minus
    mean d.
    """
    value = (tau - d).clamp(min=0)
    if normal is None:
        return value.mean()
    return _masked_mean(value, normal) + _masked_mean((d - tau / 2).clamp(min=0), ~normal)


def _masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    return (value * mask).sum() / mask.sum().clamp(min=1)


def normal_positions(size: tuple[int, int], *, label: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which positions of a (h, w) feature are normal, (B, h w) bool; None: all of them.

    A mask (B, 1, H, W) of any size decides where given: a position is anomalous if any pixel in its cell is.
    Otherwise a label (B,) of 1 makes the whole image anomalous; 0 and -1 (unknown) count as normal.
    """
    if mask is not None:
        return F.adaptive_max_pool2d(mask.float(), size).flatten(1) == 0
    if label is not None and bool((label == 1).any()):
        return (label != 1)[:, None].expand(-1, size[0] * size[1])
    return None
