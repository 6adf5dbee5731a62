"""A scalar whose gradients are formed with it, so that nothing else is kept until the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def gradients_formed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The scalar function(*inputs), with the gradients of a plain call, to the bit.

    A plain call keeps what each of its operations needs until the backward pass. This one goes forward and
    back at once and keeps the gradients alone, so that of several such scalars one at a time is in memory.

    Args:
        function: takes the inputs. A module's parameter that it uses must be among them, or gets no gradient.
        inputs: those that require no gradient get none.
    """
    return _Formed.apply(function, *inputs)


class _Formed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return function(*inputs)
        with torch.enable_grad():
            own = [_own(x) for x in inputs]
            value = function(*own)
        learning = [x for x in own if x.requires_grad]
        found = [None] * len(learning)
        if value.requires_grad:
            found = torch.autograd.grad(value, learning, allow_unused=True)
        found = iter(found)
        ctx.gradients = [next(found) if x.requires_grad else None for x in own]
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if g is None else g.mul_(outer) for g in gradients)


def _own(x: Tensor) -> Tensor:
    """Start a graph at x. A leaf stays itself, as a module knows its parameters by identity."""
    if x.is_leaf or not x.requires_grad:
        return x
    start = x.detach().requires_grad_()
    return start.view_as(start)  # hooks of modules, as a counter of operations sets them, refuse leaves here
