"""Where and how precisely to compute: device, precision, seeds, peak memory."""

import ctypes
import gc
import os
import platform
import random
import re
import sys
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h
STATUS = Path("/proc/self/status")  # Linux
PRECISIONS = ("auto", "fp32", "bf16")
BF16_MARGIN = 1.2  # bf16 must be this much faster in a matrix product to be chosen on a CPU


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device; a ValueError for another name, or a GPU that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", name):
        raise ValueError(f"device '{name}' is unknown; choose auto, cpu, cuda or cuda:N")
    device, there = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ValueError(f"device '{name}' is not there; this machine has {there} GPUs")
    return device


def choose_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Turn auto into bf16 on GPUs that have it and on CPUs where a quick probe shows it faster, else fp32.

    Some CPUs emulate bf16 a hundred times slower, so a small product comes first. ValueError: another name.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision '{name}' is unknown; choose auto, fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        half, full = torch.bfloat16, torch.float32
        emulated = _product_seconds(half, 128) > 20 * _product_seconds(full, 128)
        faster = not emulated and _product_seconds(full, 768) > BF16_MARGIN * _product_seconds(half, 768)
    return "bf16" if faster else "fp32"


def _product_seconds(dtype: torch.dtype, size: int) -> float:
    """Seconds of one matrix product: one thread, the fastest of many, so that other work does not decide."""
    a, threads, seconds = torch.ones(size, size, dtype=dtype), torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(seconds)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Context for the model's forward pass; the losses leave it and compute in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory() -> bool:
    """Let the process keep the memory of freed tensors for the next step; returns whether that could be set.

    By default glibc maps every large tensor anew and the kernel clears its pages, which takes a good part of
    a training step on a CPU (benchmarks/README.md). The process then holds its peak until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; other C libraries have none
    if mallopt is None:
        return False
    settings = {M_TRIM_THRESHOLD: -1, M_TOP_PAD: 1 << 28, M_MMAP_MAX: 0}
    return sum(mallopt(*setting) for setting in settings.items()) == len(settings)  # each gives 1


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and random, and ask for deterministic kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries may use the global generator)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # all is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_gb` count from here: what earlier runs of this process left is given back first.

    On a CPU that is possible under Linux only; elsewhere the peak stays that of the whole process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.is_file():
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        with suppress(OSError):  # not allowed everywhere
            Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak since `reset_peak_memory`: the device's memory on CUDA, else the resident set; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if STATUS.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())):
        return int(found[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def versions(device: torch.device) -> dict[str, str]:
    """Versions that a result on this device depends on, and the device's name."""
    import timm
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    }
