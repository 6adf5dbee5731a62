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

from datasets.loader import ImageSet
from datasets.readable import readable, write_skipped
from datasets.samples import IMAGE_SUFFIXES, UNKNOWN, DatasetError, Sample, find_images, printable
from datasets.transforms import Decode, Normalise
from model import build_model
from model.backbone import input_normalisation
from utils.calibration import Calibration
from utils.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, restore_model
from utils.cli import add_skip_flag, log, new_parser, run_command, say
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
    add_skip_flag(parser)
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Write scores.csv and an overlay an image, and print the most anomalous ones."""
    args = parse_arguments(argv)
    if not 0 < args.false_alarm_rate < 1:
        raise ConfigError(f"--false-alarm-rate is {args.false_alarm_rate}; choose a value between 0 and 1")
    path = find_checkpoint(args.checkpoint)
    state = load_checkpoint(path)
    root = args.images if args.images.is_dir() else args.images.parent
    samples = new_samples(args.images, args.output, state.config.data.category)
    samples, skipped = readable(samples) if args.skip_unreadable else (samples, {})
    if not samples:
        raise DatasetError(f"none of the {len(skipped)} images at {args.images} can be read")
    pictures = picture_names(samples, root)
    check_not_overwritten(samples, [args.output / "heatmaps" / name for name in pictures])
    data = image_set(samples, state)
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
    p_values = None if calibration is None else calibration.p_values(scores.score)
    write_scores(args.output / "scores.csv", scores, root, p_values=p_values, rate=args.false_alarm_rate)
    write_skipped(args.output, skipped)
    write_overlays(args.output / "heatmaps", pictures, data, scores, calibration)
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


def new_samples(where: Path, output: Path, category: str) -> list[Sample]:
    """The images at or below `where` as samples of unknown label; what is below `output` is left alone.

    Raises:
        DatasetError: if there is none, or if `output` is the folder of the images.
    """
    if where.is_dir() and where.resolve() == output.resolve():
        raise DatasetError(f"--output {output} is the folder of the images; choose another one")
    found = find_images(where) if where.is_dir() else [where]
    if output.resolve().is_relative_to(where.resolve()):
        kept = [p for p in found if not p.parent.resolve().is_relative_to(output.resolve())]
        if len(kept) < len(found):
            log.info("%d images below %s are left alone: predictions", len(found) - len(kept), output)
        found = kept
    if not found:
        raise DatasetError(f"no image at {where}; images end in {', '.join(IMAGE_SUFFIXES)}")
    return [Sample(p, UNKNOWN, None, category, "predict", "", str(p)) for p in found]


def picture_names(samples: Sequence[Sample], root: Path) -> list[Path]:
    """A picture's path below the output folder, one an image: its own below `root`, ending in .png.

    Where two images differ in their ending alone, every name keeps its ending before the new one.
    """
    inside = [s.path.relative_to(root) for s in samples]
    names = [path.with_suffix(".png") for path in inside]
    if len(set(names)) == len(names):
        return names
    return [path.with_name(f"{path.name}.png") for path in inside]


def check_not_overwritten(samples: Sequence[Sample], targets: Sequence[Path]) -> None:
    """Stop before an image is overwritten by what is written about another.

    Raises:
        DatasetError: naming the first such image.
    """
    images = {s.path.resolve() for s in samples}
    for target in targets:
        if target.resolve() in images:
            raise DatasetError(f"{printable(target)} is one of the images; choose another --output")


def image_set(samples: Sequence[Sample], state: Checkpoint) -> ImageSet:
    """The images, decoded as in training.

    Raises:
        ConfigError: if the model looks at pairs of frames.
    """
    data = state.config.data
    if data.time_step:
        raise ConfigError(
            "this model predicts a frame from an earlier one; predict.py reads single images: train with "
            "data.time_step=0"
        )
    decode = Decode(data.image_size, data.resize, data.center_crop, data.mask_threshold)
    return ImageSet(samples, decode, Normalise(*input_normalisation(state.config.model.backbone)))


def write_overlays(
    folder: Path, names: Sequence[Path], data: ImageSet, scores: Scores, calibration: Calibration | None
) -> None:
    """Write image and map side by side to the paths `names` below `folder`, all on one colour scale."""
    if calibration is None:
        scale = float(np.median(scores.maps)), float(np.quantile(scores.maps, 0.999))
    else:
        scale = calibration.low, calibration.high
    for index, name in enumerate(names):
        write_png(folder / name, overlay(data.pixels(index), scores.maps[index], scale))


def summary(scores: Scores, p_values: np.ndarray | None, rate: float, root: Path) -> str:
    """The ten most anomalous images, and how many were flagged."""
    lines = []
    for i in np.argsort(-scores.score)[:10]:
        p = (
            ""
            if p_values is None
            else f"  p = {p_values[i]:.3f}{'  ANOMALOUS' if p_values[i] <= rate else ''}"
        )
        lines.append(f"{scores.score[i]:10.4g}{p}  {printable(scores.samples[i].path.relative_to(root))}")
    flagged = (
        "" if p_values is None else f"; {int((p_values <= rate).sum())} flagged at false-alarm rate {rate:g}"
    )
    return "\n".join([*lines, f"{len(scores.score)} images, most anomalous first{flagged}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
