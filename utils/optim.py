"""The optimiser and its learning-rate schedule (Sec. 5.1 and 8.2; presets as in the public code)."""

import math
from typing import Any

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from utils.config import Config


def make_optimizer(groups: list[dict], config: Config) -> tuple[AdamW, LambdaLR]:
    """AdamW over a model's parameter groups, and the schedule, stepped once an iteration."""
    extra: dict[str, Any] = {"eps": 1e-10, "amsgrad": True} if config.optim.preset == "multi-class" else {}
    optimizer = AdamW(groups, betas=(0.9, 0.999), weight_decay=config.optim.weight_decay, **extra)
    return optimizer, LambdaLR(optimizer, lambda step: rate_at(step, config))


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
