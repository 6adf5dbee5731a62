"""`--minutes N`: how long to train, and where it is free at which image size, from steps that are timed.

A model takes a few steps and is thrown away. What is chosen are plain settings: a run's config.yaml repeats
it with the same number of steps, on any machine.
"""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datasets.build import build_data, split_samples
from datasets.images import upright_size
from datasets.loader import STATISTICS_IMAGES, TrainingOrder, training_batches
from datasets.samples import Sample
from datasets.transforms import Normalise, augment_batch
from model.backbone import input_normalisation
from model.build import build_model
from model.inference import inputs_of, to_device
from model.step import EAGER, TrainingStep
from utils import distributed
from utils.config import Config
from utils.device import choose_device, choose_precision, seed_everything
from utils.errors import ConfigError
from utils.optim import make_optimizer
from utils.runs import run_folder
from utils.yaml_io import Tree, read_yaml

SIDES = (256, 192, 128)  # of a square of the image's area; the largest at which WANTED steps fit
SMALLEST = 32  # pixels of a side, as data.image_size allows
WANTED, FEWEST, MOST = 400, 20, 2000  # steps; more than MOST brought nothing where it was tried
PROBE = EAGER + 3  # steps of which the last three are timed
WRITING = 5.0  # seconds for metrics, report and pictures
_log = logging.getLogger("uninet")


class TimeBudget:
    """The minutes that the runs of one command share.

    given: what the command line sets, as dotted keys. Raises ConfigError for minutes that are not positive,
    with a number of steps, or with several processes.
    """

    def __init__(self, minutes: float, given: Tree, file: Path) -> None:
        if not (minutes > 0 and math.isfinite(minutes)):
            found = f"--minutes is {minutes:g}"
            raise ConfigError(f"{found}; expected the minutes that training may take, more than 0")
        if any(given.get(key) is not None for key in ("train.iterations", "train.epochs")):
            raise ConfigError("--minutes chooses the number of steps, --iterations gives it; leave one out")
        if distributed.world_size() > 1:
            raise ConfigError("--minutes times one process; with torchrun give --iterations")
        self.end = time.perf_counter() + 60 * minutes
        self.sized = "data.image_size" in given or "image_size" in (read_yaml(file).get("data") or {})

    def fit(self, config: Config, args: Namespace, *, runs: int) -> Config:
        """The configuration of the first of `runs` runs that are to come, with its length.

        With --resume an earlier run keeps what was chosen for it. Of own images the size is free unless it is
        given; the size of a published dataset is part of its protocol.
        """
        if config.model.name == "memory-bank":
            _log.info("--minutes changes nothing: memory-bank takes no steps")
            return config
        data = config.data
        free = data.name == "folder" and not self.sized and data.tile is None and data.center_crop is None
        before = chosen_before(config, args.output, args.name, free=free) if args.resume else None
        seconds = (self.end - time.perf_counter()) / runs
        steps, size = before or choose(config, seconds, free=free)
        train = replace(config.train, iterations=steps, epochs=None)
        return replace(config, train=train, data=replace(data, image_size=size))


def choose(config: Config, seconds: float, *, free: bool) -> tuple[int, tuple[int, int]]:
    """Length, and where it is `free` the image size, of a run that takes so long; said in one line."""
    start, device = time.perf_counter(), choose_device(config.run.device)
    precision = choose_precision(config.train.precision, device)
    config = replace(config, train=replace(config.train, precision=precision))
    samples = split_samples(config).train
    multiple = 2 * config.model.strides[-1]  # so that a decoder restores each level at its size
    sizes = [shape_of(samples, side, multiple) for side in SIDES] if free else [config.data.image_size]
    for size in dict.fromkeys(sizes):
        step, rest = measure(replace(config, data=replace(config.data, image_size=size)), device)
        possible = int((seconds - (time.perf_counter() - start) - rest) / step)
        if possible >= WANTED:
            break
    steps = min(max(possible, FEWEST), MOST)
    _log.info(
        "%s, %.1f minutes: %d steps of %.3f s at %dx%d pixels, and %.0f s for the rest%s",
        config.data.category, seconds / 60, steps, step, *size, rest,
        "" if possible >= FEWEST else " (more than that: no run is shorter)",
    )  # fmt: skip
    return steps, size


def chosen_before(
    config: Config, output: Path, name: str | None, *, free: bool
) -> tuple[int, tuple[int, int]] | None:
    """What was chosen for an earlier run with the same other settings; the latest counts."""
    aside = ["train.iterations", "train.epochs", *(["data.image_size"] if free else [])]
    aside += ["train.precision"] if config.train.precision == "auto" else []
    there = run_folder(config, output, name).parent.glob("*/config.yaml")
    files = [path for path in there if name in (None, path.parent.name)]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        tree = read_yaml(path)
        if _without(tree, aside) == _without(config.to_dict(), aside):
            _log.info("%s keeps its length, %s steps", path.parent, tree["train"]["iterations"])
            height, width = tree["data"]["image_size"]
            return tree["train"]["iterations"], (height, width)
    return None


def _without(tree: Tree, keys: Sequence[str]) -> Tree:
    return {s: {k: v for k, v in part.items() if f"{s}.{k}" not in keys} for s, part in tree.items()}


# --- measuring ----------------------------------------------------------------------------------------------


def shape_of(samples: Sequence[Sample], side: int, multiple: int) -> tuple[int, int]:
    """Height and width of a square's area, shaped as the images, no larger, in multiples of `multiple`."""
    spread = np.linspace(0, len(samples) - 1, 16).round().astype(int)
    width, height = np.median([upright_size(samples[i].path) for i in spread], axis=0)
    side = min(side, (height * width) ** 0.5)
    stretch = float(np.clip(height / width, 0.25, 4)) ** 0.5
    least = -(-SMALLEST // multiple)
    sides = [max(least, int(length / multiple)) * multiple for length in (side * stretch, side / stretch)]
    return sides[0], sides[1]


def measure(config: Config, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of the rest: decoding, a bank, scoring held-out and test images, writing."""
    data, train = build_data(config, Normalise(*input_normalisation(config.model.backbone))), config.train
    seed_everything(train.seed)
    model = build_model(config, pretrained=False).to(device).to(memory_format=torch.channels_last)
    optimizer, _ = make_optimizer(model.parameter_groups(config.optim), config)
    training_step = TrainingStep(model.train(), optimizer, config, start=train.iterations)
    order = TrainingOrder(len(data.train), train.batch_size, seed=train.seed, start=0, stop=PROBE)
    start = time.perf_counter()
    first = list(training_batches(data.train, order, workers=0, device=torch.device("cpu")))
    decode = (time.perf_counter() - start) / (PROBE * train.batch_size)
    model.fit_statistics(inputs_of(to_device(batch, device)) for batch in first)
    start = time.perf_counter()
    if model.fits:
        model.fit((inputs_of(to_device(batch, device)) for batch in first), seed=train.seed)
    whole = min(model.fits, len(data.train)) / (PROBE * train.batch_size)
    bank, seconds = whole * (time.perf_counter() - start), []
    start = time.perf_counter()
    for batch in training_batches(data.train, order, workers=0, device=torch.device("cpu")):
        categories = [data.train.samples[i].category for i in batch["index"].tolist()]
        batch = augment_batch(to_device(batch, device), config, 0, categories)
        training_step(batch)["total"].item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    with torch.inference_mode():
        model.eval().predict(inputs_of(to_device(first[0], device))).score.sum().item()
    score = (time.perf_counter() - start) / train.batch_size
    later = len(data.calibration) + len(data.test)
    rest = bank + decode * (data.train.cached + later) + score * (later + STATISTICS_IMAGES) + WRITING
    return float(np.median(seconds[EAGER:])), rest
