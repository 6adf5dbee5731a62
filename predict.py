"""Score new images: an image or a folder -> scores.csv and heatmaps.

python predict.py --checkpoint RUN IMAGE_OR_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from datasets.build import images_below
from datasets.loader import ImageSet
from datasets.transforms import Normalise
from model import build_model
from model.backbone import input_normalisation
from utils.calibration import Calibration
from utils.checkpoint import find_checkpoint, load_checkpoint, restore_model
from utils.cli import log, new_parser, run_command, say
from utils.config import ConfigError
from utils.device import choose_device, choose_precision
from utils.evaluation import Scores, score_images, write_scores
from utils.figures import overlay, write_png


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument(
        "images", type=Path, metavar="IMAGE_OR_FOLDER", help="folders are searched below, too"
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run folder or a checkpoint file"
    )
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR")
    parser.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.01,
        metavar="R",
        help="share of normal images that may be flagged",
    )
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Write scores.csv and an overlay an image, and print the most anomalous ones."""
    args = parse_arguments(argv)
    if not 0 < args.false_alarm_rate < 1:
        raise ConfigError(f"--false-alarm-rate is {args.false_alarm_rate}; choose a value between 0 and 1")
    path = find_checkpoint(args.checkpoint)
    state = load_checkpoint(path)
    if state.config.data.time_step:
        raise ConfigError(
            "this model predicts a frame from an earlier one; predict.py reads single images: train with "
            "data.time_step=0"
        )
    data = images_below(
        args.images, state.config, Normalise(*input_normalisation(state.config.model.backbone))
    )
    device = choose_device(args.device)
    model = build_model(state.config, pretrained=False).to(device, memory_format=torch.channels_last)
    restore_model(model, state.model, source=path)
    scores = score_images(
        model.deploy(),
        data,
        batch_size=state.config.eval.batch_size,
        device=device,
        precision=choose_precision(state.config.train.precision, device),
        quiet=args.quiet,
    )
    calibration = Calibration(**state.calibration) if state.calibration else None
    root = args.images if args.images.is_dir() else args.images.parent
    p_values = None if calibration is None else calibration.p_values(scores.score)
    write_scores(args.output / "scores.csv", scores, root, p_values=p_values, rate=args.false_alarm_rate)
    write_overlays(args.output, data, scores, calibration, root)
    say(summary(scores, p_values, args.false_alarm_rate, root))
    if calibration is None:
        log.info(
            "the model was trained without data.calibration_fraction: no p-values, colours fit these images"
        )
    elif calibration.smallest_rate() > args.false_alarm_rate:
        smallest, held_out = calibration.smallest_rate(), len(calibration.scores)
        log.info(
            "%d held-out normals guarantee a false-alarm rate of %.3g at best, so none is flagged at %.3g; "
            "hold out more, or choose a higher --false-alarm-rate",
            held_out, smallest, args.false_alarm_rate,
        )  # fmt: skip
    log.info("written to %s", args.output)


def write_overlays(
    folder: Path, data: ImageSet, scores: Scores, calibration: Calibration | None, root: Path
) -> None:
    """Write <folder>/heatmaps/<path below root>.png, image and map side by side, all on one colour scale."""
    if calibration is None:
        scale = float(np.median(scores.maps)), float(np.quantile(scores.maps, 0.999))
    else:
        scale = calibration.low, calibration.high
    for index, sample in enumerate(scores.samples):
        target = folder / "heatmaps" / sample.path.relative_to(root).with_suffix(".png")
        write_png(target, overlay(data.pixels(index), scores.maps[index], scale))


def summary(scores: Scores, p_values: np.ndarray | None, rate: float, root: Path) -> str:
    """The ten most anomalous images, and how many were flagged."""
    lines = []
    for i in np.argsort(-scores.score)[:10]:
        p = (
            ""
            if p_values is None
            else f"  p = {p_values[i]:.3f}{'  ANOMALOUS' if p_values[i] <= rate else ''}"
        )
        lines.append(f"{scores.score[i]:10.4g}{p}  {scores.samples[i].path.relative_to(root)}")
    flagged = (
        "" if p_values is None else f"; {int((p_values <= rate).sum())} flagged at false-alarm rate {rate:g}"
    )
    return "\n".join([*lines, f"{len(scores.score)} images, most anomalous first{flagged}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
