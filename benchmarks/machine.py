"""What this machine can do: large channels-last convolutions and matrix products, in GFLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from operations import Operations
from protocol import Reply, Spec, Workload, wait

CONVOLUTION = (8, 256, 64, 64)  # a 3 x 3 convolution of 256 to 256 channels: 39 GFLOP
PRODUCT = 3072  # side of square matrices: 58 GFLOP
REPEATS = 3
CALLS = {"cpu": 1, "cuda": 50}  # in a row; a GPU has done one before a clock is read


def machine(spec: Spec) -> tuple[Workload, Operations]:
    """Fastest of some runs of each, so that a short disturbance does not lower the limit."""
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    batch, channels, height, width = CONVOLUTION
    x = torch.randn(CONVOLUTION, device=spec.device, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv = conv.to(spec.device, dtype).to(memory_format=torch.channels_last)
    a, b = (torch.randn(PRODUCT, PRODUCT, device=spec.device, dtype=dtype) for _ in range(2))
    conv_gflop = 2 * batch * height * width * channels**2 * 9 / 1e9

    @torch.inference_mode()
    def run() -> Reply:
        return {
            "convolution": conv_gflop / _fastest(lambda: conv(x), spec.device),
            "product": 2 * PRODUCT**3 / 1e9 / _fastest(lambda: a @ b, spec.device),
        }

    run()
    return run, Operations()


def _fastest(call: Callable[[], object], device: str) -> float:
    seconds, calls = [], CALLS[device.split(":")[0]]
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds)
