"""Replace a trained model's held-out scores: after another lens, lamp or material, without training.

python calibrate.py --checkpoint RUN GOOD_IMAGES
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

import predict
from datasets.build import image_set, trained_parts
from datasets.check import filter_unreadable
from datasets.samples import Sample
from datasets.splits import first_copies, shared_images
from evaluation.scoring import calibrate, collect_scores
from model.detector import Calibration, Detector
from utils import cli
from utils.checkpoint import RECALIBRATED, load_checkpoint
from utils.errors import DatasetError, RunError
from utils.files import printable


def main(argv: Sequence[str]) -> None:
    """Score good images and write the model with these scores as its held-out ones."""
    parser = cli.new_parser(__doc__.split("\n")[0])
    predict.add_flags(parser, "GOOD_IMAGES", "an image, or a folder with what is below it; not trained on")
    text = f"replace an earlier {RECALIBRATED} beside the checkpoint"
    parser.add_argument("--overwrite", action="store_true", help=text)
    text = "leave out files that cannot be read, each with a warning"
    parser.add_argument("--skip-unreadable", action="store_true", help=text)
    args = parser.parse_args(argv)
    detector = predict.detector_of(args)
    path = detector.path.with_name(RECALIBRATED)
    if path.exists() and not args.overwrite:
        raise RunError(f"{path} is there already; rename it, or replace it with --overwrite")
    samples = good_samples(args.images, detector, skip_unreadable=args.skip_unreadable)
    data = image_set(detector.config, detector.normalise, samples)
    calibration = calibrate(collect_scores(detector.predictions(data, quiet=args.quiet), data))
    state = load_checkpoint(detector.path)  # with the weights as they were trained
    replace(state, config=detector.config, calibration=asdict(calibration)).save(path)
    cli.print_result(summary(calibration, detector.calibration, args.false_alarm_rate))
    cli.print_result(f"written to {printable(path)}: give it as --checkpoint")


def good_samples(where: Path, detector: Detector, *, skip_unreadable: bool) -> list[Sample]:
    """The images at or below `where`, each once. Raises DatasetError if there is none, or if the model was
    trained on one of them: it scores such images lower than new ones.
    """
    samples = predict.samples_at(where, None, detector.config)
    samples = filter_unreadable(samples)[0] if skip_unreadable else samples
    if not samples:
        raise DatasetError(f"no image at {where} can be read")
    first = first_copies(s.path for s in samples)
    samples = [s for s in samples if first[s.path] == s.path]  # copies say nothing new
    parts = trained_parts(detector.config, detector.state.identity)
    trained = [*parts.train, *parts.scale, *parts.validation] if parts else []
    for ours, theirs in shared_images(trained, samples):
        same = f"{printable(theirs.path)} is the same file as {printable(ours.path)}"
        raise DatasetError(f"{same}, which the model was trained on; give images that it has not seen")
    return samples


def summary(new: Calibration, old: Calibration | None, rate: float) -> str:
    """How many images there are, what that allows, and how far they are from the old ones."""
    count, needed = len(new.scores), normals_needed(rate)
    more = f"{needed - count} more" if needed > count else "enough"
    text = f"{count} held-out images; a false-alarm rate of {rate:g} needs {needed}: {more}"
    if old is not None:
        middle = np.median(old.p_values(np.asarray(new.scores)))
        text += f"\nby the {len(old.scores)} old ones their median p-value is {middle:.3g}"
        text += " (about 0.5 where nothing has changed)"
    return text


def normals_needed(rate: float) -> int:
    """How many held-out normals guarantee that false-alarm rate: the smallest n with 1 / (n + 1) <= rate."""
    return math.ceil((1 - 1e-12) / rate) - 1  # 1 / rate may be rounded up


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
