"""Peak memory of evaluating a large generated test set: maps, metrics and nothing that grows beside them.

python benchmarks/evaluation_memory.py --images 10000

Images, maps and masks are made on the fly by a model that costs nothing, so what is measured is the scoring
path: batches in, maps kept, all metrics of one category at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.loader import ImageSet  # noqa: E402
from datasets.samples import Sample  # noqa: E402
from datasets.transforms import Decode, Normalise  # noqa: E402
from evaluation.scoring import results_by_category, score_images  # noqa: E402
from model.base import AnomalyModel  # noqa: E402
from model.decision import Prediction  # noqa: E402
from model.inference import ScoringOptions  # noqa: E402
from utils.cli import new_parser, print_result, run_command  # noqa: E402
from utils.device import peak_memory_gb  # noqa: E402
from utils.layers import load_config  # noqa: E402
from utils.yaml_io import CONFIGS  # noqa: E402

CPU = torch.device("cpu")


class GeneratedSet(ImageSet):
    """Noise images; every second one has a square that is brighter and a mask."""

    def __init__(self, count: int, side: int) -> None:
        kinds = ("good", "square")
        samples = [
            Sample(Path(f"{i}.png"), i % 2, None, "generated", "test", kinds[i % 2], "") for i in range(count)
        ]
        super().__init__(samples, Decode((side, side)), Normalise((0.5,) * 3, (0.5,) * 3))
        self.has_masks = True

    def pixels(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        noise = np.random.default_rng(index).integers(0, 200, (*self.decode.size, 3), dtype=np.uint8)
        return noise + 30 * self.mask(index)[..., None]

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 in {0, 1}: a sixteenth of an anomalous image."""
        mask, side = np.zeros(self.decode.size, np.uint8), self.decode.size[0] // 4
        mask[side : 2 * side, side : 2 * side] = index % 2
        return mask


class Brightness(AnomalyModel):
    """The mean of the channels as the map, made finer by noise so that nearly all values differ."""

    def predict(self, images: Tensor) -> Prediction:
        """Images (B, 3, H, W) to maps (B, H, W) and their maxima (B,)."""
        maps = images.mean(dim=1)
        maps = maps + 1e-3 * torch.rand_like(maps)
        return Prediction(maps, maps.amax(dim=(1, 2)))


def main(argv: Sequence[str]) -> None:
    """Score, measure, and say the peak in parts."""
    args = parse_arguments(argv)
    options = load_config(CONFIGS / "mvtec.yaml", {}).run
    data, before = GeneratedSet(args.images, args.size), peak_memory_gb(CPU)
    scores = score_images(Brightness(), data, ScoringOptions(16, CPU, "fp32", args.quiet))
    scored, start = peak_memory_gb(CPU), time.perf_counter()
    mean = results_by_category(scores, options)["mean"]
    seconds = time.perf_counter() - start
    assert scores.masks is not None
    kept = (scores.maps.nbytes + scores.masks.nbytes) / 2**30
    peak = peak_memory_gb(CPU)
    print_result(
        f"{args.images} images of {args.size}x{args.size}: peak {peak:.2f} GB, "
        f"of which maps and masks {kept:.2f}, the process before {before:.2f}; after scoring "
        f"{scored:.2f}. "
        f"Metrics took {seconds:.1f} s (pixel AUROC {mean['pixel_auroc']:.4f}, PRO {mean['pro']:.4f})."
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10000, help="of the set")
    parser.add_argument("--size", type=int, default=256, help="side of the maps, pixels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
