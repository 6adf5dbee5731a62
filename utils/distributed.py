"""Several processes as one: the same numbers as one process with the same global batch.

`torchrun --nproc_per_node N train.py ...` starts N copies. Each takes its slice of every batch and of every
set that is scored; gradients, batch statistics and mining thresholds are those of the whole batch; the
leading process gathers scores and alone writes. In a single process everything here does nothing.

Legend: B images of a process, W processes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from datasets.samples import ANOMALOUS, Sample
from evaluation.scoring import Scores
from utils.config import Config
from utils.errors import ConfigError

T = TypeVar("T")
Loss = Callable[[dict[str, Tensor], float], dict[str, Tensor]]


# --- processes ----------------------------------------------------------------------------------------------


@contextmanager
def processes() -> Iterator[None]:
    """Join the group that torchrun describes, if there is one: NCCL between GPUs, gloo for all else."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    # the others wait while the leading process measures and writes, which on a large set takes long
    patience = timedelta(hours=2)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank of this process and their number W; (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def leads() -> bool:
    """Whether this process writes."""
    return place()[0] == 0


def own_device(device: torch.device) -> torch.device:
    """Each process its own GPU.

    Raises:
        ConfigError: if a machine has fewer GPUs than processes.
    """
    if place()[1] == 1 or device.type != "cuda":
        return device
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= torch.cuda.device_count():
        raise ConfigError(
            f"process {own} of this machine has no GPU, there are {torch.cuda.device_count()}; "
            "start one process a GPU (--nproc_per_node), or add --device cpu"
        )
    torch.cuda.set_device(own)
    return torch.device("cuda", own)


def agreed(value: T) -> T:
    """The leading process's value, on all; a barrier as well."""
    if place()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def leader_first() -> Iterator[None]:
    """The leading process runs the body before the others, as it may write."""
    if not leads():
        agreed(None)
    yield
    if leads():
        agreed(None)


def check(config: Config, training: list[Sample]) -> None:
    """Refuse what several processes would not compute as one does.

    Raises:
        ConfigError: naming the setting.
    """
    world = place()[1]
    if world == 1:
        return
    if config.model.name not in ("uninet", "recontrast"):
        raise ConfigError(f"several processes train uninet and recontrast; run {config.model.name} in one")
    if config.train.batch_size % world:
        raise ConfigError(f"train.batch_size {config.train.batch_size} is no multiple of {world} processes")
    if config.train.last_batch == "keep":
        raise ConfigError("several processes share equal batches: train.last_batch carry or drop, not keep")
    mixed = config.data.synthetic or any(s.label == ANOMALOUS for s in training)
    if config.data.augment != "none" or config.data.tile or mixed or config.loss.kd_hardest < 1:
        raise ConfigError(
            "several processes need normal training images, not augmented, no tiles, no synthetic defects, "
            "loss.kd_hardest 1: otherwise losses are no means over the images of a batch; run this in one "
            "process"
        )


# --- training -----------------------------------------------------------------------------------------------


def shared_loss(model: nn.Module) -> Loss:
    """`model.loss`, whose backward pass leaves each process the gradients of the whole batch.

    Batch norms of the model take the statistics of the whole batch from now on.
    """
    if place()[1] == 1:
        return model.loss
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = type(f"Global{type(module).__name__}", (GlobalBatchNorm, type(module)), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames an argument that 2.10 needs
        # buffers are equal everywhere. static_graph: each step uses the same parts, some parameters never
        return DistributedDataParallel(_LossModule(model), broadcast_buffers=False, static_graph=True)


class _LossModule(nn.Module):
    """DistributedDataParallel looks at `forward` alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        return self.model.loss(batch, progress)


class GlobalBatchNorm(nn.Module):
    """Mixed into a batch norm: in training, statistics over the batches of all processes.

    torch's SyncBatchNorm is for GPUs only and knows no activation inside; this one serves both devices, so
    that what is tested is what runs. Batches have the same size everywhere.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; timm's kind applies its activation."""
        if not self.training:
            return super().forward(x)
        count = x.numel() // x.shape[1] * place()[1]
        values = x.float()
        mean = _Sum.apply(values.sum((0, 2, 3))) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        found = (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)
        return self.act(self.drop(found)) if hasattr(self, "act") else found


class _Sum(torch.autograd.Function):
    """Sum over processes; every process's loss depends on it, so gradients add up as well."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return _all_sum(x)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _all_sum(gradient)


def _all_sum(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def averaged(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss parts (scalars) of the whole batch, for the log."""
    world = place()[1]
    if world == 1:
        return parts
    total = _all_sum(torch.stack([value.detach().float() for value in parts.values()])) / world
    return dict(zip(parts, total, strict=True))


# --- scoring ------------------------------------------------------------------------------------------------


def own_indices(count: int) -> range:
    """The piece of a set of `count` images that this process scores."""
    rank, world = place()
    return range(count * rank // world, count * (rank + 1) // world)


def gathered(scores: Scores) -> Scores | None:
    """All processes' pieces in the set's order, for the leading process; None for the others."""
    rank, world = place()
    if world == 1:
        return scores
    pieces: list[Scores | None] = [None] * world
    dist.gather_object(scores, pieces if rank == 0 else None)
    if rank > 0:
        return None
    return replace(
        scores,
        samples=[sample for piece in pieces for sample in piece.samples],
        score=np.concatenate([piece.score for piece in pieces]),
        maps=np.concatenate([piece.maps for piece in pieces]),
        masks=None if scores.masks is None else np.concatenate([piece.masks for piece in pieces]),
    )
