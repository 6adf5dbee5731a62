"""Curves of a training: TensorBoard events, one JSON line a log step, and the progress bar."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import printable, write_text
from utils.runs import Results
from utils.yaml_io import Tree

LOG = "log.jsonl"
LOG_EVERY = 20  # steps between its lines
Panel = np.ndarray | None  # a picture (H, W, 3) uint8


def show_final(
    folder: Path, iteration: int, results: dict[str, Results], *, split: str, panel: Panel
) -> None:
    """Add the last evaluation of a run to its TensorBoard events; `panel` (H, W, 3) uint8 if there is one."""
    with SummaryWriter(str(folder)) as writer:
        _show(writer, iteration, results, split=split, panel=panel)


def _show(
    writer: SummaryWriter, iteration: int, results: dict[str, Results], *, split: str, panel: Panel
) -> None:
    for category, values in results.items():
        for name, value in values.items():
            if isinstance(value, float):
                writer.add_scalar(f"{split}/{printable(category)}/{name}", value, iteration)
    if panel is not None:
        writer.add_image(f"{split}/heatmaps", torch.from_numpy(panel.copy()).permute(2, 0, 1), iteration)


def _lines(folder: Path) -> list[str]:
    path = folder / LOG
    whole = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in whole if line.endswith("}\n")]  # a kill may cut the last one


def validation_curve(folder: Path) -> list[Tree]:
    """Evaluations during training from log.jsonl: iteration, split, and the mean results."""
    entries = [entry for entry in map(json.loads, _lines(folder)) if "split" in entry]
    return [{"iteration": e["iteration"], "split": e["split"], **e["results"]["mean"]} for e in entries]


class NullTracker:
    """A tracker's place in processes that do not write."""

    def step(self, *_: object, **__: object) -> None:
        """Nothing."""

    evaluation = note = close = step


class Tracker:
    """Collects loss parts without a sync, and writes their means after the first step and every LOG_EVERY.

    Lines after step `start`, of a run that was killed and goes on from there, are dropped from log.jsonl.
    """

    def __init__(self, folder: Path, *, start: int, stop: int, quiet: bool) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=start)
        kept = [line for line in _lines(folder) if json.loads(line)["iteration"] <= start]
        write_text(folder / LOG, "".join(kept))
        self.lines = (folder / LOG).open("a", encoding="utf-8")
        self.bar = tqdm(initial=start, total=stop, desc="training", unit="step", disable=quiet or None)
        self.began, self.quiet, self.images, self.count = time.perf_counter(), quiet, 0, 0
        self.sums: dict[str, Tensor] = {}

    def step(
        self,
        iteration: int,
        parts: dict[str, Tensor],
        *,
        lr: dict[str, float | Tensor],
        images: int,
        diagnose: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Take one step's loss parts (scalars); `iteration` counts finished steps.

        diagnose: gives further curves; called only when a line is written.
        """
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count, self.images = self.count + 1, self.images + images
        self.bar.update()
        if iteration == 1 or iteration % LOG_EVERY == 0:
            self._write(iteration, {name: float(rate) for name, rate in lr.items()}, diagnose())

    def _write(self, iteration: int, lr: dict[str, float], diagnostics: dict[str, float]) -> None:
        means = {name: float(value) / self.count for name, value in self.sums.items()}  # the one sync
        rate = self.images / (time.perf_counter() - self.began)
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()} | {"images/s": f"{rate:.1f}"})
        curves = {f"loss/{name}": value for name, value in means.items()} | diagnostics
        for name, value in (curves | {f"lr/{name}": value for name, value in lr.items()}).items():
            self.writer.add_scalar(name, value, iteration)
        self.line({"iteration": iteration, **means, "lr": lr, "images_per_s": round(rate, 2)})
        self.sums, self.count = {}, 0

    def note(self, text: str) -> None:
        """Say something above the progress bar."""
        if not self.quiet:
            self.bar.write(text, file=sys.stderr)

    def line(self, tree: dict[str, object]) -> None:
        """Append one JSON line to log.jsonl."""
        self.lines.write(json.dumps(tree) + "\n")
        self.lines.flush()

    def evaluation(self, iteration: int, results: dict[str, Results], *, split: str, panel: Panel) -> None:
        """Write an evaluation during training: metrics by category, and a picture (H, W, 3) uint8."""
        _show(self.writer, iteration, results, split=split, panel=panel)
        self.line({"iteration": iteration, "split": split, "results": results})

    def close(self) -> None:
        """Flush and close the files."""
        self.bar.close()
        self.writer.close()
        self.lines.close()
