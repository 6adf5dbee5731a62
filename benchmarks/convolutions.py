"""GFLOP/s of a training step's convolutions, forward and backward, by memory layout: where a CPU is slow."""

from __future__ import annotations

import argparse
import os
import sys
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tables import markdown  # noqa: E402

from utils.cli import new_parser, print_result, run_command  # noqa: E402  # isort: skip  # before PyTorch
import torch  # noqa: E402

# kernel, channels in, channels out, side: of WideResNet50-2, bottleneck and student at 256 x 256
SHAPES = (
    (3, 64, 64, 64),
    (3, 128, 128, 64),
    (1, 256, 128, 64),
    (1, 128, 256, 64),
    (3, 256, 256, 32),
    (3, 512, 512, 16),
    (1, 512, 1024, 16),
    (7, 256, 256, 16),
)
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
BATCH, REPEATS = 8, 3


def main(argv: Sequence[str]) -> None:
    """Print one row per shape."""
    parser: argparse.ArgumentParser = new_parser(__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first N")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    passes = ("forward", "to the input", "to the weights")
    lines = [["convolution", *(f"{layout}: {name}" for layout in LAYOUTS for name in passes)]]
    for shape in SHAPES[: args.shapes]:
        kernel, channels, outputs, side = shape
        speeds = [speed for layout in LAYOUTS.values() for speed in measure(*shape, layout)]
        name = f"{kernel}x{kernel}, {channels} to {outputs}, {side}x{side}"
        lines.append([name, *(f"{speed:.0f}" for speed in speeds)])
    print_result(markdown(lines))


def measure(kernel: int, channels: int, outputs: int, side: int, layout: torch.memory_format) -> list[float]:
    """GFLOP/s of the convolution, of its gradient to the input and of that to the weights."""
    x = torch.randn(BATCH, channels, side, side).contiguous(memory_format=layout)
    weight = torch.randn(outputs, channels, kernel, kernel).contiguous(memory_format=layout)
    padding = kernel // 2
    with torch.inference_mode():
        y = torch.nn.functional.conv2d(x, weight, padding=padding)
        outer = torch.ones_like(y)

        def back(*wanted: bool) -> Callable[[], object]:
            sides = [1, 1], [padding, padding], [1, 1]
            return lambda: torch.ops.aten.convolution_backward(
                outer, x, weight, None, *sides, False, [0, 0], 1, [*wanted, False]
            )

        calls = [
            lambda: torch.nn.functional.conv2d(x, weight, padding=padding),
            back(True, False),
            back(False, True),
        ]
        seconds = [min(timeit.repeat(call, number=1, repeat=1 + REPEATS)[1:]) for call in calls]
    operations = 2 * y.numel() * channels * kernel**2
    return [operations / s / 1e9 for s in seconds]


if __name__ == "__main__":
    sys.exit(run_command(main))
