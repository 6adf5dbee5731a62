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
        # a leaf stays itself, as a module knows its parameters by identity
        own = [x if x.is_leaf else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        learning = [x for x in own if x.requires_grad]
        with torch.enable_grad():
            value = function(*own)
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
