"""Several processes compute what one process would with the same global batch.

`torchrun --nproc_per_node N train.py ...` starts N copies. Each takes its shard of every batch and of every
set that is scored. DistributedDataParallel averages gradients over processes, so a loss term is right if its
mean over processes is that of the global batch: what a term is divided by, or compared with, is reduced over
all processes. The main process gathers the scores and alone writes. In a single process nothing is changed.

Legend: W processes.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from utils.config import TrainConfig
from utils.errors import ConfigError

T = TypeVar("T")
Loss = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]


@contextmanager
def processes() -> Iterator[None]:
    """Join the group that torchrun describes, if there is one: NCCL between GPUs, gloo for all else."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    patience = timedelta(hours=2)  # while the main process measures and writes, the others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number W of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes."""
    return rank() == 0


def device_for_rank(device: torch.device) -> torch.device:
    """Each process its own GPU; a ConfigError if a machine has fewer GPUs than processes."""
    if world_size() == 1 or device.type != "cuda":
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        found = f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}"
        raise ConfigError(f"{found}; start one process per GPU (--nproc_per_node), or add --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def broadcast_object(value: T) -> T:
    """The main process's value, on all; a barrier as well."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the body before the others, as it may write."""
    if not is_main_process():
        broadcast_object(None)
    yield
    if is_main_process():
        broadcast_object(None)


def check_batches(train: TrainConfig, samples: int) -> None:
    """Raise a ConfigError if some batch of an epoch of `samples` images cannot be shared equally."""
    world, last = world_size(), samples % train.batch_size if train.last_batch == "keep" else 0
    if train.batch_size % world:
        raise ConfigError(f"train.batch_size {train.batch_size} is no multiple of {world} processes")
    if last % world:
        raise ConfigError(f"train.last_batch keep leaves a batch of {last} for {world} processes; use carry")


def wrap_ddp(model: nn.Module, loss: Loss) -> Loss:
    """`loss` of the model, whose backward pass leaves each process the gradients of the global batch.

    Batch norms of the model take the statistics of the global batch from now on. Random numbers that a loss
    draws (dropout and noise of UniAS) differ between processes: the one part that is not as in one process.
    """
    if world_size() == 1:
        return loss
    if not is_main_process():
        torch.manual_seed(int(torch.randint(2**31, ())) + rank())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = type(f"Global{type(module).__name__}", (GlobalBatchNorm, type(module)), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 renames an argument that 2.10 needs
        # buffers are equal everywhere. static_graph: each step uses the same parts, some parameters never
        return DistributedDataParallel(_LossModule(model, loss), broadcast_buffers=False, static_graph=True)


class _LossModule(nn.Module):
    """DistributedDataParallel looks at `forward` alone."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> dict[str, Tensor]:
        return self.loss(batch, progress)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Mixed into a batch norm: in training, statistics over the equal batches of all processes.

    torch's SyncBatchNorm is for GPUs only and drops the activation of timm's kind; this one serves both
    devices, so that what is tested is what runs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; timm's kind applies its activation."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        count = x.numel() // x.shape[1] * world_size()
        values = x.float()
        mean = all_reduce(values.sum((0, 2, 3))) / count  # its gradients are summed over processes, too
        centred = values - mean.view(1, -1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        out = (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)
        for name in ("drop", "act"):
            out = getattr(self, name, nn.Identity())(out)
        return out


def all_sum(x: Tensor) -> Tensor:
    """Sum over processes."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def all_concat(x: Tensor) -> Tensor:
    """One tensor (B, ...) per process, all of one shape, in the order of the global batch: (W B, ...)."""
    if world_size() == 1:
        return x
    pieces = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(pieces, x.contiguous())
    return torch.cat(pieces)


def global_count(mask: Tensor) -> Tensor:
    """True positions of the global batch, at least 1, divided by W.

    A local sum over this has the mean over all true positions as its mean over processes.
    """
    count = all_sum(mask.sum()).clamp(min=1)
    return count if world_size() == 1 else count / world_size()


def global_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) standard deviation over all values of tensors of one size."""
    if world_size() == 1:
        return x.mean(), x.std()
    count = x.numel() * world_size()
    mean = all_sum(x.sum()) / count
    return mean, (all_sum((x - mean).square().sum()) / (count - 1)).sqrt()


def reduce_mean(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss parts (scalars) of the global batch, for the log."""
    if world_size() == 1:
        return parts
    means = all_sum(torch.stack([value.detach().float() for value in parts.values()])) / world_size()
    return dict(zip(parts, means, strict=True))


def shard(count: int) -> range:
    """Indices of this process's shard of `count` images; the shards of all ranks follow one another."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def gather(value: T) -> list[T] | None:
    """The values of all processes in order of rank, for the main process; None for the others."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.gather_object(value, values if is_main_process() else None)
    return values if is_main_process() else None
