"""Curves of a training: TensorBoard events, one JSON line a log step, and the progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Tracker:
    """Collects loss parts without a sync, and every `log_every` steps writes their means."""

    def __init__(self, folder: Path, *, start: int, stop: int, log_every: int, quiet: bool) -> None:
        self.writer = SummaryWriter(str(folder), purge_step=start if start else None)
        self.lines = (folder / "log.jsonl").open("a", encoding="utf-8")
        self.log_every, self.began, self.images = log_every, time.perf_counter(), 0
        self.bar = tqdm(
            initial=start, total=stop, desc="training", unit="step", disable=True if quiet else None
        )
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def step(self, iteration: int, parts: dict[str, Tensor], *, lr: dict[str, float], images: int) -> None:
        """Take one step's loss parts (scalars); `iteration` counts finished steps."""
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count, self.images = self.count + 1, self.images + images
        self.bar.update()
        if iteration % self.log_every == 0:
            self._write(iteration, lr)

    def _write(self, iteration: int, lr: dict[str, float]) -> None:
        means = {name: float(value) / self.count for name, value in self.sums.items()}  # the one sync
        rate = self.images / (time.perf_counter() - self.began)
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in means.items()} | {"images/s": f"{rate:.1f}"})
        for name, value in means.items():
            self.writer.add_scalar(f"loss/{name}", value, iteration)
        for name, value in lr.items():
            self.writer.add_scalar(f"lr/{name}", value, iteration)
        self.line({"iteration": iteration, **means, "lr": lr, "images_per_s": round(rate, 2)})
        self.sums, self.count = {}, 0

    def line(self, tree: dict[str, object]) -> None:
        """Append one JSON line to log.jsonl."""
        self.lines.write(json.dumps(tree) + "\n")
        self.lines.flush()

    def metrics(self, iteration: int, results: dict[str, dict], *, split: str) -> None:
        """Write metrics of an evaluation, named by split and category."""
        for category, values in results.items():
            for name, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{split}/{category}/{name}", value, iteration)
        self.line({"iteration": iteration, "split": split, "results": results})

    def heatmaps(self, iteration: int, panel: np.ndarray) -> None:
        """Show a picture (H, W, 3) uint8 of fixed images."""
        self.writer.add_image("heatmaps", torch.from_numpy(panel).permute(2, 0, 1), iteration)

    def close(self) -> None:
        """Flush and close the files."""
        self.bar.close()
        self.writer.close()
        self.lines.close()
