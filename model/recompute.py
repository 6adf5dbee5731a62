"""Less memory for more time: activations of a block are computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.layers import BatchNorm


def recompute_activations(model: nn.Module) -> int:
    """Make each learning block of the model keep its input alone, in place; return the number of blocks.

    A block is a member of an `nn.Sequential` that itself belongs to a list or a network (a residual block of
    a teacher, a module of the bottleneck, a block of the student). Losses, gradients and running statistics
    stay the same to the bit where the operations themselves are deterministic.
    """
    blocks = list(_blocks(model))
    for block in blocks:
        block.forward = partial(_recomputed, block, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        learns = any(p.requires_grad for p in child.parameters())
        if not learns:
            continue
        if isinstance(child, nn.Sequential) and any(len(list(part.children())) for part in child):
            yield from (part for part in child if list(part.parameters()))
        else:
            yield from _blocks(child)


def _recomputed(block: nn.Module, forward: partial, x: Tensor) -> Tensor:
    if not block.training:
        return forward(x)
    contexts = lambda: (nullcontext(), _statistics_kept(block))  # noqa: E731
    return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms take the batch's statistics as before, but do not count them a second time."""
    norms = [m for m in block.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked -= 1
