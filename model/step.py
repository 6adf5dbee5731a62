"""A training step that never waits for the device, so that a GPU can replay it whole, as a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from model.base import AnomalyModel
from model.layers import BatchNorm
from utils import distributed
from utils.config import Config
from utils.device import autocast
from utils.graphs import Replayed, Tensors

EAGER = 3  # steps of a kind of batch before its capture


class TrainingStep:
    """Forward pass, losses, backward pass and update of a model; the schedule is the caller's.

    A loss that is not finite is not waited for. The device notes it, and from then on nothing is updated, so
    neither weights nor the optimiser's state ever see it (statistics of batch norms do); `first_bad` tells.

    loss: of the model, or that of several processes (`distributed.wrap_ddp`). start: steps done before.
    """

    def __init__(
        self,
        model: AnomalyModel,
        optimizer: AdamW,
        config: Config,
        *,
        loss: distributed.Loss | None = None,
        start: int = 0,
    ) -> None:
        self.model, self.optimizer, self.config, self.loss = model, optimizer, config, loss or model.loss
        self.device = next(model.parameters()).device
        self.done = torch.tensor(float(start), dtype=torch.float64, device=self.device)
        self.good = self.done.clone()  # stays behind from the first step on whose loss is not finite
        self.noted: Tensors = {}  # loss parts of the last step, or of that one
        self.norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.momentum is not None]
        on_gpu = self.device.type == "cuda" and distributed.world_size() == 1
        self.run: Callable[[Tensors], Tensors] = self._run
        if on_gpu and config.run.graph == "auto":
            self.run = Replayed(self._run, "the training step", eager=EAGER)

    def __call__(self, batch: Tensors) -> Tensors:
        """The loss parts (scalars) of a batch on the device; the next call may overwrite them."""
        return self.run(batch)

    def first_bad(self) -> tuple[int, dict[str, float]] | None:
        """The first step whose loss was not finite, its number from 0 and its parts, if any. A sync point."""
        if self.good == self.done:
            return None
        return int(self.good), {name: value.item() for name, value in self.noted.items()}

    def _run(self, batch: Tensors) -> Tensors:
        try:
            with autocast(self.device, self.config.train.precision), counted_at_once(self.norms):
                parts = self.loss(batch, self.done / self.config.train.iterations)
            parts["total"].backward()
            if self.config.optim.grad_clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip, foreach=True)
            parts = {name: value.detach() for name, value in parts.items()}
            self._update(parts)
        finally:  # here, so that the next forward pass need not hold the gradients
            self.optimizer.zero_grad(set_to_none=True)
        return parts

    def _update(self, parts: Tensors) -> None:
        """Step the optimiser if all losses so far were finite, in every process."""
        so_far = self.good == self.done
        for name, value in parts.items():
            if name not in self.noted:
                self.noted[name] = torch.zeros_like(value)
            self.noted[name].copy_(torch.where(so_far, value, self.noted[name]))
        bad = distributed.all_sum(parts["total"].isfinite().logical_not().float())
        self.good += (bad == 0) & so_far
        self.done += 1
        behind = (self.good != self.done).float()
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = behind  # type: ignore[attr-defined]  # what gradient scalers set
        elif behind:  # a CPU has nothing to wait for
            return
        self.optimizer.step()


@contextmanager
def counted_at_once(norms: list[BatchNorm]) -> Iterator[None]:
    """Count the batches of all these norms by one operation; with a momentum nobody reads their counters."""
    norms = [norm for norm in norms if norm.training]
    counters: list[Any] = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in zip(norms, counters, strict=True):
            norm.num_batches_tracked = counter
    if counters:
        torch._foreach_add_(counters, 1)
