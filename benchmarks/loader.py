"""Images per second of the loader by its number of processes, beside those of a training step.

python benchmarks/loader.py -- --dataset mvtec --data-root DIR --category screw --model remind

After `--` come the flags of train.py. Images are decoded before, as in a training. What is timed are defects
that are drawn, normalisation and the way between processes. Augmentation belongs to the step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from protocol import wait  # noqa: E402
from tables import markdown  # noqa: E402

import train  # noqa: E402
from datasets.build import RunData  # noqa: E402
from datasets.loader import TrainingOrder, training_batches  # noqa: E402
from datasets.transforms import augment_batch  # noqa: E402
from model import build_model  # noqa: E402
from model.inference import to_device  # noqa: E402
from model.step import EAGER, TrainingStep  # noqa: E402
from utils.cli import new_parser, overrides, print_result, run_command  # noqa: E402
from utils.config import Config  # noqa: E402
from utils.device import choose_device, choose_precision, seed_everything  # noqa: E402
from utils.layers import load_config  # noqa: E402
from utils.optim import make_optimizer  # noqa: E402


def main(argv: Sequence[str]) -> None:
    """Measure, and print one row per number of processes."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], help="numbers of processes"
    )
    parser.add_argument("--batches", type=int, default=100, help="timed for each number")
    parser.add_argument("--steps", type=int, default=10, help="timed of the training step")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- and flags of train.py")
    args = parser.parse_args(argv)
    given = train.parse_arguments([word for word in args.train if word != "--"])
    config = load_config(given.config, overrides(given), category=given.category)
    device = choose_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    config, data, _ = train.contents(replace(config, train=replace(config.train, precision=precision)))
    data.train.fill_cache(quiet=True)
    rows = [["processes", "images/s"]]
    for workers in args.workers:
        rows.append([str(workers), f"{loaded(config, data, workers, args.batches, device):.3g}"])
    rows.append([f"the step, {precision}, {device}", f"{stepped(config, data, args.steps, device):.3g}"])
    print_result(f"{os.cpu_count()} cores, batches of {config.train.batch_size}\n\n{markdown(rows)}")


def batches(config: Config, data: RunData, count: int, workers: int, device: torch.device) -> Iterator:
    """So many batches, as a training loads them."""
    order = TrainingOrder(len(data.train), config.train.batch_size, seed=0, start=0, stop=count)
    return iter(training_batches(data.train, order, workers=workers, device=device))


def loaded(config: Config, data: RunData, workers: int, count: int, device: torch.device) -> float:
    """Images per second, from when each process has given some."""
    first = 3 * max(1, workers)
    source = batches(config, data, first + count, workers, device)
    for _ in range(first):
        next(source)
    start = time.perf_counter()
    for _ in source:
        pass
    return count * config.train.batch_size / (time.perf_counter() - start)


def stepped(config: Config, data: RunData, count: int, device: torch.device) -> float:
    """Images per second of augmentation and step, on batches that are there."""
    seed_everything(0)
    model = build_model(config, pretrained=False).to(device).to(memory_format=torch.channels_last).train()
    optimizer, _ = make_optimizer(model.parameter_groups(config.optim), config)
    step, there = TrainingStep(model, optimizer, config), list(batches(config, data, 4, 0, device))
    for i in range(EAGER + 1 + count):
        if i == EAGER + 1:
            wait(device.type)
            start = time.perf_counter()
        batch = there[i % len(there)]
        names = [data.train.samples[k].category for k in batch["index"].tolist()]
        step(augment_batch(to_device(batch, device), config, i, names))
    wait(device.type)
    return count * config.train.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command(main))
