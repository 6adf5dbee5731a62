"""Functions of tensors that a GPU replays as CUDA graphs: one launch in place of hundreds.

A GPU computes the operations of a small batch faster than a processor launches them one by one.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Captured = tuple[torch.cuda.CUDAGraph, Tensors, Tensors]  # with its inputs and outputs
log = logging.getLogger("uninet")


class Replayed:
    """A function captured once for each kind of input (names, shapes, types, autocast), then replayed.

    The first `eager` calls of a kind run as they are: libraries choose their kernels in them, and what comes
    once is not worth a capture. A kind that cannot be captured stays so, which one line says. A capture
    computes nothing. All that the function reads or writes beside its inputs must stay where it is in memory,
    and nothing in it may wait for the device.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], name: str, *, eager: int) -> None:
        self.function, self.name, self.eager = function, name, eager
        self._calls: Counter[tuple] = Counter()
        self._graphs: dict[tuple, Captured | None] = {}
        self._pool: Any = None  # of memory, for all graphs, as one runs at a time

    def __call__(self, inputs: Tensors) -> Tensors:
        """As the function; the next call overwrites the outputs."""
        cast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = (cast, *((name, x.shape, x.dtype) for name, x in sorted(inputs.items())))
        self._calls[kind] += 1
        if self._calls[kind] > self.eager and kind not in self._graphs:
            try:
                self._graphs[kind] = self._capture(inputs)
            except RuntimeError as error:
                found = f"{self.name} is not captured as a CUDA graph, which would be faster"
                log.warning("%s: %s", found, str(error).partition("\n")[0])
                self._graphs[kind] = None
        captured = self._graphs.get(kind)
        if captured is None:
            return self.function(inputs)
        graph, static, outputs = captured
        for name, x in inputs.items():
            static[name].copy_(x, non_blocking=True)
        graph.replay()
        return outputs

    def _capture(self, inputs: Tensors) -> Captured:
        static = {name: x.clone() for name, x in inputs.items()}
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the next batch's memory may go on
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self.function(static)
        return graph, static, outputs
