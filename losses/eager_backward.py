"""Compute a scalar loss and its gradients in one pass, freeing the graph at once."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def eager_backward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The scalar function(*inputs), with the gradients of a plain call, to the bit.

    A plain call keeps what each of its operations needs until the backward pass. This one goes forward and
    back at once and keeps the gradients alone, so that of several such scalars one at a time is in memory. A
    module's parameter that the function uses must be among the inputs, or gets no gradient.
    """
    return _EagerBackward.apply(function, *inputs)


class _Context(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradients: list[Tensor | None]


class _EagerBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return function(*inputs)
        with torch.enable_grad():
            starts = [_start_of_graph(x) for x in inputs]
            value = function(*starts)
        learning = [i for i, x in enumerate(starts) if x.requires_grad]
        ctx.gradients = [None] * len(starts)
        if value.requires_grad:
            gradients = torch.autograd.grad(value, [starts[i] for i in learning], allow_unused=True)
            for i, gradient in zip(learning, gradients, strict=True):
                ctx.gradients[i] = gradient
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, []
        return None, *(None if g is None else g.mul_(outer) for g in gradients)


def _start_of_graph(x: Tensor) -> Tensor:
    """A leaf stays itself, as a module knows its parameters by identity."""
    if x.is_leaf or not x.requires_grad:
        return x
    start = x.detach().requires_grad_()
    return start.view_as(start)  # hooks of modules, as a counter of operations sets them, refuse leaves here
