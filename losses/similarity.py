"""Similarity-contrastive loss L_SC and margin loss L_M (Sec. 4.4, Eqs. 8 to 11).

Both need only the diagonal of the softmax over teacher positions, d_j = exp(m_jj) / sum_k exp(m_jk), with
m = s t^T / T for L2-normalised features. `diagonal_and_logsumexp` gives m_jj and log sum_k exp(m_jk) by
blocks of rows, so the N x N matrix is never in memory, forward or backward.

Legend: B images, N = H W positions, C channels; G images and R rows of a block.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from utils.distributed import global_count

EPS = 1e-8  # epsilon of Eqs. 9 and 10
Diagonal = tuple[Tensor, Tensor | None]  # d of a pair and which positions are normal (None: all), (B, N)
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # 4 MB of float32 stay in cache; a GPU needs more to do
SAFE_BOUND = 40.0  # logits within +-40 of zero: exp(-80) is still a normal float32


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]
    temperature: float


class _DiagonalAndLogSumExp(torch.autograd.Function):
    """Diagonal and row log-sum-exp of s t^T / T, and their gradients.

    The student's gradient needs softmax(m) t, which the forward pass forms beside the row sums. The teacher's
    needs softmax(m)^T times the weighted student: rows are then teacher positions, normalised by their lse.
    """

    @staticmethod
    def forward(ctx: _Context, student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        diagonal = (student * teacher).sum(dim=2) / temperature  # (B, N)
        expected, lse = torch.empty_like(student), torch.empty_like(diagonal)
        keys, values = teacher / temperature, teacher.transpose(1, 2).contiguous()
        bound = 1 / temperature  # of the logits, as rows have length one
        offset = torch.full_like(diagonal, -bound)
        for images, rows in _blocks(student):
            weights = _product(student[images, rows], keys[images], offset[images])  # (G, R, N)
            shift = torch.zeros_like(lse[images, rows])
            if bound > SAFE_BOUND:  # else the bound does, and saves a pass
                shift = weights.amax(dim=2)
                weights.sub_(shift[..., None])
            total = weights.exp_().sum(dim=2)
            lse[images, rows] = total.log() + shift + bound
            expected[images, rows] = _product(weights, values[images]).div_(total[..., None])
        ctx.save_for_backward(student, teacher, lse, expected)
        ctx.temperature = temperature
        return diagonal, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, g_diagonal: Tensor, g_lse: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        student, teacher, lse, expected = ctx.saved_tensors
        g_diagonal, g_lse = g_diagonal[..., None] / ctx.temperature, g_lse[..., None] / ctx.temperature
        g_student = g_teacher = None
        if ctx.needs_input_grad[0]:
            g_student = g_diagonal * teacher + g_lse * expected
        if ctx.needs_input_grad[1]:
            g_teacher = g_diagonal * student
            keys, values = student / ctx.temperature, (g_lse * student).transpose(1, 2).contiguous()
            for images, rows in _blocks(teacher):
                weights = _product(teacher[images, rows], keys[images], -lse[images]).exp_()
                g_teacher[images, rows] += _product(weights, values[images])
        return g_student, g_teacher, None


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Images and rows of each block of the (B, N, N) matrix: several images, one, or a part of one."""
    images, positions = x.shape[:2]
    size = BLOCK_ELEMENTS["cpu" if x.device.type == "cpu" else "cuda"]
    group, rows = max(1, size // positions**2), min(positions, max(1, size // positions))
    for b in range(0, images, group):
        for i in range(0, positions, rows):
            yield slice(b, b + group), slice(i, i + rows)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Per image a b^T + bias: (G, R, C), (G, N, C) and (G, N) to (G, R, N)."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and _onednn_multiplies():
        biases = [None] * len(a) if bias is None else bias
        products = [_onednn_product(*block) for block in zip(a, b, biases, strict=True)]
        return products[0][None] if len(products) == 1 else torch.stack(products)
    if bias is None:
        return torch.bmm(a, b.transpose(1, 2))
    return torch.baddbmm(bias[:, None], a, b.transpose(1, 2))


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The product a b^T + bias by a private operator of torch, which no public function calls in float32."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@cache
def _onednn_multiplies() -> bool:
    """Whether that operator is there and right; on some CPUs it is twice as fast as torch.mm."""
    a, b = (torch.arange(first, first + 12, dtype=torch.float32).view(4, 3) for first in (0, 5))
    bias = torch.arange(4, dtype=torch.float32)  # the operator misreads one that is not contiguous
    try:
        return torch.equal(_onednn_product(a, b, bias), torch.addmm(bias, a, b.T))
    except (AttributeError, RuntimeError, TypeError):  # another torch, or a build without oneDNN
        return False


def diagonal_and_logsumexp(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Diagonal m_jj and row log-sum-exp of the similarity matrix m (Eq. 8), each (B, N), exact.

    student, teacher: (B, N, C), L2-normalised along C, rows and columns of m; other shapes are a ValueError.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {student.shape} and teacher {teacher.shape} must have one shape")
    return _DiagonalAndLogSumExp.apply(student.contiguous(), teacher.contiguous(), temperature)


def softmax_diagonal(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The diagonal d of the normalised similarity matrix (Eq. 9), (B, N) in (0, 1], of two (B, C, H, W)."""
    s = F.normalize(student.flatten(2).transpose(1, 2).float(), dim=2)
    t = F.normalize(teacher.flatten(2).transpose(1, 2).float(), dim=2)
    diagonal, lse = diagonal_and_logsumexp(s, t, temperature)
    return torch.exp(diagonal - lse)


def diagonal_statistics(d: Tensor, normal: Tensor | None, temperature: float) -> dict[str, float]:
    """Mean of d (B, N) over normal and over anomalous positions, where there are any, and its highest value.

    It cannot exceed that of a match of cosine 1 among N - 1 of cosine -1: 0.011 for N = 256 and T = 2.
    """
    normal = torch.ones_like(d, dtype=torch.bool) if normal is None else normal
    parts = {"normal": d[normal], "anomalous": d[~normal]}
    means = {name: float(part.mean()) for name, part in parts.items() if len(part)}
    return means | {"highest": 1 / (1 + (d.shape[1] - 1) * math.exp(-2 / temperature))}


def contrastive_loss(d: Tensor, normal: Tensor | None = None) -> Tensor:
    """L_SC of one pair (Eq. 10): mean of -log(d + eps), d (B, N), over `normal` positions (None: all)."""
    value = -torch.log(d + EPS)
    return value.mean() if normal is None else _masked_mean(value, normal)


def margin_loss(d: Tensor, tau: float, normal: Tensor | None = None) -> Tensor:
    """L_M of one pair (Eq. 11): mean of max(0, tau - d) over normal, of max(0, d - tau / 2) over others.

    With T = 2 d stays below 0.011 at 256 px: for tau = 1 the hinge never closes, the loss is 1 - mean d.
    """
    value = (tau - d).clamp(min=0)
    if normal is None:
        return value.mean()
    return _masked_mean(value, normal) + _masked_mean((d - tau / 2).clamp(min=0), ~normal)


def _masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    return (value * mask).sum() / global_count(mask)


def unmasked_positions(size: Sequence[int], mask: Tensor) -> Tensor:
    """Positions of a (h, w) feature with no masked pixel in their cell, (B, h w) bool; mask: (B, 1, H, W)."""
    return F.adaptive_max_pool2d(mask.float(), tuple(size)).flatten(1) == 0


def normal_positions(size: Sequence[int], *, label: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which positions of a (h, w) feature are normal, (B, h w) bool; None: all of them.

    A mask (B, 1, H, W) decides where given. Otherwise a label (B,) of 1 makes the whole image anomalous; 0
    and -1 (unknown) count as normal.
    """
    if mask is not None:
        return unmasked_positions(size, mask)
    if label is not None:
        return (label != 1)[:, None].expand(-1, size[0] * size[1])
    return None
