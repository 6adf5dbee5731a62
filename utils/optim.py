"""The optimiser and its learning-rate schedule (Sec. 5.1 and 8.2; presets as in the public code)."""

import math
from typing import Any

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from utils.config import Config


def make_optimizer(
    groups: list[dict], config: Config, *, fused: bool | None = None
) -> tuple[AdamW, LambdaLR]:
    """AdamW over a model's parameter groups, and the schedule, stepped once an iteration.

    fused: one operation for all weights, which leaves them alone where `found_inf` says so; rates and counts
    of steps are tensors on the device, as a CUDA graph needs it (None: on a GPU).
    """
    extra: dict[str, Any] = {"eps": 1e-10, "amsgrad": True} if config.optim.preset == "multi-class" else {}
    device = groups[0]["params"][0].device
    fused = device.type != "cpu" if fused is None else fused
    extra |= {"fused": True, "capturable": True} if fused else {}
    optimizer = AdamW(groups, betas=(0.9, 0.999), weight_decay=config.optim.weight_decay, **extra)
    schedule = LambdaLR(optimizer, lambda step: rate_at(step, config))
    for group in optimizer.param_groups if fused else []:
        group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer, schedule


def rate_at(step: int, config: Config) -> float:
    """Factor on the learning rates at a step: warm-up, then as `optim.schedule` in base.yaml says."""
    optim, total = config.optim, config.train.iterations
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    if optim.schedule == "step":
        return 0.2 if step >= 0.8 * total else 1.0
    if optim.schedule == "tenth":
        return 0.1 ** int(step / (0.4 * total))
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - optim.warmup) / max(1, total - optim.warmup)))
    return 1.0
