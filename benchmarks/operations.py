"""Floating-point operations: convolutions counted while they run, the similarity loss by its formula.

A multiplication and an addition are two operations. Norms, activations, softmax and the optimiser belong to
what keeps a step from its limit and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Operations:
    """GFLOP of convolutions and of matrix products, which run at different speeds."""

    convolution: float = 0.0
    product: float = 0.0

    @property
    def total(self) -> float:
        """GFLOP of both."""
        return self.convolution + self.product

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.convolution + other.convolution, self.product + other.product)

    def limit(self, convolution_rate: float, product_rate: float) -> float:
        """Seconds that they need at these GFLOP/s."""
        return self.convolution / convolution_rate + self.product / product_rate


def convolutions(run: Callable[[], object]) -> Operations:
    """Those of one call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    flop = sum(n for operator, n in counts.items() if str(operator).startswith("aten.convolution"))
    return Operations(convolution=flop / 1e9)


def similarity(batch: int, positions: int, channels: int, *, teacher_learns: bool) -> Operations:
    """L_SC and L_M of one pair, forward and backward: the fewest products there can be.

    One for the matrix, one for the student's gradient, one for the teacher's where it has one; nothing is
    computed twice.
    """
    one = 2 * batch * positions**2 * channels / 1e9
    return Operations(product=(3 if teacher_learns else 2) * one)


def similarity_of_step(batch: int, size: int, levels: Sequence[tuple[int, int]]) -> Operations:
    """Of a whole training step: (channels, stride) a level, a frozen and a learning teacher each."""
    total = Operations()
    for channels, stride in levels:
        for learns in (False, True):
            total += similarity(batch, (size // stride) ** 2, channels, teacher_learns=learns)
    return total
